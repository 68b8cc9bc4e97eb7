"""The supervised task `transformer` at toy size."""

import jax
from flax import nnx

from jax_idgrpo.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    RolloutConfig,
    VideoConfig,
)
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.sampling.pipeline import save_vae
from jax_idgrpo.training.task import make_task

DATA = DataConfig(max_people=3, text_length=80)
BATCH = 16  # one size for all, so that the cast is compiled once


def make_config(tmp_path_factory):
    """A run on a pipeline folder that holds a random VAE and a random text encoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    sizes = VAEConfig(4, (1, 1, 2, 2), 1, (False, True, True), (0.0,) * 16, (1.0,) * 16)
    save_vae(WanVAE(sizes, rngs=nnx.Rngs(0)), folder)
    options = dict(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1)
    task = make_task(
        Config(data=DATA, finetune=FinetuneConfig(task="text", batch=BATCH, options=options))
    )
    task.save(task.init(jax.random.key(1)), folder)
    shape = dict(
        num_layers=3,
        num_heads=2,
        head_dim=12,
        ffn_dim=16,
        freq_dim=16,
        vace_layers=[0, 2],
        pool=4,
        face_weight=2.0,
    )
    return Config(
        model=ModelConfig(path=str(folder)),
        data=DATA,
        video=VideoConfig(frames=5, height=32, width=32, fps=8),
        rollout=RolloutConfig(shift=3.0, steps=2, guidance=2.0),
        finetune=FinetuneConfig(
            task="transformer", batch=2, options=shape | {"pool_file": str(folder / "pool.npz")}
        ),
    )
