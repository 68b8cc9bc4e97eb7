"""Running the converter's command, and the names and shapes of published networks."""

from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from checkpoints_convert import __main__ as command
from checkpoints_convert import store
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from tests.helpers.paths import GOLDEN

PIPELINE = GOLDEN / "tiny_vace"
ADAPTER = GOLDEN / "lora_peft_tiny"
PUBLISHED_VAE = VAEConfig(
    base_dim=96,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)


def wan_shapes(config: WanConfig, dtype: str = "float32", *variables) -> nnx.State:
    """Return the shapes of a transformer's parameters."""
    model = nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    )
    return nnx.state(model, *variables) if variables else nnx.state(model)


def text_shapes(config: UMT5Config) -> nnx.State:
    """Return the shapes of a text encoder's parameters."""
    return nnx.state(
        nnx.eval_shape(
            lambda: UMT5Encoder(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
        )
    )


def vae_shapes(config: VAEConfig) -> nnx.State:
    """Return the shapes of an autoencoder's parameters."""
    return nnx.state(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))


def same_bits(a, b) -> bool:
    """Return whether two arrays are equal in dtype, shape and bits."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    )  # row-major, whatever the strides


TENSORS = {
    "b": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
    "a.weight": np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32),
    "flag": np.array([True, False, True]),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def run(*words) -> int:
    """Run `idgrpo-convert` on the command line `words` and return its exit status."""
    return command.run([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor of every file, by file and name, with its dtype and shape."""
    return {
        f"{file.relative_to(folder)} {name} {tensor.dtype} {tensor.shape}": np.asarray(
            tensor
        ).tobytes()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in store.open_file(file)[0].items()
    }
