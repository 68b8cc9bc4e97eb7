"""Our adapters and folders in the libraries people use: peft, diffusers, transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline, WanVACETransformer3DModel
from flax import nnx
from peft import PeftModel, get_peft_model_state_dict
from transformers import UMT5EncoderModel

from checkpoints_convert import lora, rules, wan
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.sampling import adapters, pipeline
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN
from tests.helpers.torch_models import channels_first, channels_last

TOKENIZER = GOLDEN / "tiny_vace"
BOUND = 1e-5  # the limit asked for is 1e-4


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"latents": (2, 3, 4, 6, 16), "text": (2, 5, 32), "control": (2, 3, 4, 6, 96)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values["text"][1, 3:] = 0
    return values | {"timesteps": np.array([985, 206], np.int32)}


@nnx.jit
def velocity(model, latents, timesteps, text, control) -> jax.Array:
    return model(latents, timesteps, text, control=control)


def ours(model: WanTransformer, arrays) -> np.ndarray:
    return np.asarray(
        velocity(
            model, *(jnp.asarray(arrays[k]) for k in ("latents", "timesteps", "text", "control"))
        )
    )


def theirs(model, arrays) -> np.ndarray:
    out = model(
        hidden_states=channels_first(arrays["latents"]),
        timestep=torch.tensor(arrays["timesteps"]),
        encoder_hidden_states=torch.tensor(arrays["text"]),
        control_hidden_states=channels_first(arrays["control"]),
        return_dict=False,
    )
    return channels_last(out[0])


def adapted(base: WanTransformer, rank: int, alpha: float) -> WanTransformer:
    """With random A and B: a fresh adapter's B is zero."""
    model = adapters.add_adapter(base, rank, alpha, jax.random.key(0))
    rng = np.random.default_rng(7)
    nnx.update(
        model,
        jax.tree.map(
            lambda a: jnp.asarray(rng.normal(scale=0.3, size=a.shape), a.dtype),
            nnx.state(model, LoRAParam),
        ),
    )
    return model


@pytest.mark.parametrize(("rank", "alpha"), [(3, 12.0), (4, 4.0)])
def test_peft_loads_our_adapter_and_gives_our_velocity(tmp_path, arrays, rank, alpha):
    torch_models.vace(seed=2).save_pretrained(tmp_path / "transformer")
    base = pipeline.load_transformer(tmp_path)
    model = adapted(base, rank, alpha)
    state = nnx.state(model, LoRAParam)
    adapters.save_lora(tmp_path / "adapter", state, model.config)

    torch_base = WanVACETransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
    plain = theirs(torch_base, arrays)
    peft = PeftModel.from_pretrained(torch_base, tmp_path / "adapter").eval()
    want, got = theirs(peft, arrays), ours(model, arrays)
    assert relative_error(ours(base, arrays), plain) < BOUND
    assert relative_error(got, want) < BOUND
    assert relative_error(want, plain) > 0.05
    saved = rules.to_torch(lora.rules(model.config), state)
    loaded = get_peft_model_state_dict(peft)
    assert set(loaded) == set(saved)
    assert all(np.array_equal(loaded[name].numpy(), value) for name, value in saved.items())


def test_our_folder_loads_strictly_in_diffusers_and_transformers(tmp_path, arrays):
    sources = {
        "transformer": torch_models.vace((0, 2), seed=4),
        "vae": torch_models.vae(seed=5),
        "text_encoder": torch_models.umt5(seed=6),
    }
    for part, model in sources.items():
        model.save_pretrained(tmp_path / "torch" / part)
    parts = tmp_path / "torch"
    golden_tokenizer = pipeline.load_tokenizer(TOKENIZER)
    pipe = pipeline.Pipeline(
        transformer=pipeline.load_transformer(parts),
        vae=pipeline.load_vae(parts),
        text_encoder=pipeline.load_text_encoder(parts),
        tokenizer=golden_tokenizer,
        shift=3.0,
        kind="vace",
        path=parts,
    )
    pipe.transformer = adapted(pipe.transformer, 2, 2.0)  # which the folder must not hold
    pipeline.save_pipeline(pipe, tmp_path / "ours")

    classes = {
        "transformer": WanVACETransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }
    for part, model_class in classes.items():
        loaded, info = model_class.from_pretrained(
            tmp_path / "ours" / part, output_loading_info=True
        )
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ), info
        for name, value in sources[part].state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    whole = WanVACEPipeline.from_pretrained(tmp_path / "ours")
    assert whole.scheduler.config.flow_shift == 3.0
    assert whole.tokenizer("a man smiles").input_ids == golden_tokenizer("a man smiles").input_ids
    whole.transformer.eval()
    base = pipeline.load_transformer(tmp_path / "ours")
    assert relative_error(ours(base, arrays), theirs(whole.transformer, arrays)) < BOUND


def test_original_names_give_the_same_parameters(tmp_path):
    """The original repository's names, by the table's other column, against diffusers' for the same weights."""
    torch_model = torch_models.vace(seed=8)
    torch_model.save_pretrained(tmp_path / "transformer")
    model = pipeline.load_transformer(tmp_path)
    original = rules.to_torch(wan.rules(model.config, "original"), nnx.state(model))
    state = torch_model.state_dict()
    pairs = {
        "blocks.1.cross_attn.norm_k.weight": "blocks.1.attn2.norm_k.weight",
        "blocks.3.norm3.bias": "blocks.3.norm2.bias",
        "head.modulation": "scale_shift_table",
        "vace_blocks.1.after_proj.weight": "vace_blocks.1.proj_out.weight",
        "vace_blocks.0.before_proj.bias": "vace_blocks.0.proj_in.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
    }
    for name, diffusers_name in pairs.items():
        np.testing.assert_array_equal(original[name], state[diffusers_name].numpy())
