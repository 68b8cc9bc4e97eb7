"""A tiny Phantom policy: its network, a pipeline folder and a run's configuration."""

import dataclasses
import shutil

from flax import nnx

from jax_idgrpo import config as c
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.sampling import pipeline

ROWS, STEPS, FRAMES, PEOPLE, LENGTH, WIDTH = 4, 3, 2, 2, 5, 16
CONFIG = WanConfig(
    num_layers=2,
    num_heads=2,
    head_dim=12,
    ffn_dim=32,
    text_dim=WIDTH,
    freq_dim=16,
    rank=2,
    alpha=2.0,
    unroll=True,
)


def short(checkpoint, steps=1):
    return c.Config(
        model=c.ModelConfig(path=str(checkpoint), kind="phantom", rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(
            prompts=2, group=2, steps=3, guidance=7.5, window="fixed", window_size=1
        ),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        reward=c.RewardConfig(
            frames=2, mixture={"motion": 1.0}
        ),  # a random model shows no face: motion alone tells its videos apart
        run=c.RunConfig(steps=steps, save_every=1, sample_every=0),
    )


def make_checkpoint(tmp_path_factory):
    """The embedded VAE, text encoder and tokenizer with a plain Wan transformer of random weights, as a diffusers folder."""
    folder = tmp_path_factory.mktemp("phantom") / "pipeline"
    shutil.copytree(c.EMBEDDED / "pipeline", folder)
    text = pipeline.load_text_encoder(folder).config
    config = dataclasses.replace(CONFIG, text_dim=text.d_model, rank=0)
    transformer = WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(5))
    pipeline.save_transformer(transformer, folder, 5.0)
    return folder
