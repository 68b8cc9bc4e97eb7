"""A tiny policy with photos behind the video, such as Phantom: network, pipeline folder and a run's configuration."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_idgrpo import config as c
from jax_idgrpo import rng
from jax_idgrpo.config.model_kinds import MODEL_KINDS
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.sampling import pipeline, policy, rollout
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.training import update
from tests.helpers.noise import add_noise

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


def short(checkpoint, steps=1, kind="phantom"):
    """Return the configuration of a run of `steps` steps on a pipeline folder."""
    return c.Config(
        model=c.ModelConfig(path=str(checkpoint), kind=kind, rank=2, alpha=2.0, unroll=True),
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


SCHEDULE = rollout.Schedule.make(STEPS, 5.0)
NEGATIVE = jnp.asarray(np.random.default_rng(3).normal(size=(LENGTH, WIDTH)), jnp.float32)
NOISE = rng.row_keys(rng.key(0, "noise"), jnp.asarray([7, 7, 9, 9]), jnp.asarray([0, 1, 0, 1]))
ADVANTAGE = jnp.asarray([1.3, -0.7, 0.2, -0.9])
FIRST = jnp.zeros(ROWS, jnp.int32)
WINDOW = rollout.Window(start=FIRST, size=STEPS - 1, final_noise=False)


@functools.cache
def model(guidance=7.5, image_guidance=5.0, remat="none"):
    """Return a policy whose every parameter is random."""
    config = dataclasses.replace(CONFIG, remat=remat)
    transformer = WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    add_noise(transformer)
    return policy.split(transformer, guidance, image_guidance)


@functools.cache
def asked(kind="phantom"):
    """Return the conditioning of four rows: one or two photos each."""
    rng = np.random.default_rng(2)
    references = jnp.asarray([1, 2, 2, 1])
    return Conditioning(
        text=jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32),
        control=None,
        frame_mask=jnp.ones((ROWS, FRAMES), bool),
        references=references,
        # Not zero in the padding, which must not change the velocity.
        reference_latents=jnp.asarray(rng.normal(size=(ROWS, PEOPLE, 4, 6, 16)), jnp.float32),
        padding_attended=MODEL_KINDS[kind].slots > 0,
        photos_read_text=MODEL_KINDS[kind].photos_read_text,
    )


def sampled(parts, rows=slice(None), given=None):
    """Return one chunk of a rollout."""
    actor, lora, base = parts
    given = given or jax.tree.map(lambda leaf: leaf[rows], asked())
    window = jax.tree.map(lambda leaf: leaf[rows], WINDOW)
    trajectory = rollout.sample(
        actor,
        PolicyInputs(lora, base, given, NEGATIVE),
        SCHEDULE,
        NOISE[rows],
        NOISE[rows],
        window,
    )
    return update.Rollout(
        trajectory=trajectory, conditioning=given, start=window.start, noise=NOISE[rows]
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(fixed, lora, base, batch):
    """Return the gradient of the first update, and its numbers per step and row."""
    return update.gradients(
        fixed, lora, update.Networks(base=base, negative=NEGATIVE), batch, SCHEDULE, jnp.int32(0)
    )


def objective(actor):
    """Return the default objective."""
    return update.UpdateRule(
        policy=actor, grpo=c.GrpoConfig(), optimizer=optax.sgd(1.0), ema_decay=0.9
    )


def chunked(chunks):
    """Return a rollout of chunks, as a training step stores it."""
    whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)
    return dataclasses.replace(
        whole,
        advantage=ADVANTAGE.reshape(len(chunks), -1),
        weight=jnp.ones((len(chunks), ROWS // len(chunks))),
    )
