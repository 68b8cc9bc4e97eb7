"""A pipeline with two experts, and a tiny policy of two with its rollouts."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

from checkpoints_convert import store
from jax_idgrpo.config import EMBEDDED, GrpoConfig
from jax_idgrpo.models.experts import Pair
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.training import update
from tests.helpers.noise import add_noise
from tests.helpers.update import ADVANTAGE, CONFIG, FIRST, NEGATIVE, NOISE, asked, chunked, whole

BOUNDARY = 0.875
WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 4
SCHEDULE = rollout.Schedule.make(STEPS, 3.0, boundary=0.875)
OPTIMIZER = Pair(optax.adam(1e-2), optax.adam(1e-2))


@functools.cache
def model(remat="none"):
    """A policy of two experts with different weights, both adapters random."""
    config = dataclasses.replace(CONFIG, remat=remat, unroll=remat == "none")
    networks: list[WanTransformer] = []
    for _ in range(2):
        networks.append(
            WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(len(networks)))
        )
        add_noise(networks[-1])
        nnx.update(
            networks[-1],
            jax.tree.map(lambda leaf: leaf * (1 + 0.1 * len(networks)), nnx.state(networks[-1])),
        )
    return policy.split_experts(networks, (3.0, 2.0))


@functools.cache
def batch(first=0, size=STEPS - 1, remat="none"):
    """A rollout of one chunk with a window."""
    actor, lora, base = model(remat)
    window = whole(FIRST + first, size)
    trajectory = rollout.sample_experts(
        actor, PolicyInputs(lora, base, asked(), NEGATIVE), SCHEDULE, NOISE, NOISE, window
    )
    chunk = update.Rollout(
        trajectory=trajectory, conditioning=asked(), start=window.start, noise=NOISE
    )
    return chunked([chunk], ADVANTAGE)


def objective(actor):
    """Return an objective of both experts, with the distance from the base."""
    return update.UpdateRule(
        policy=actor, grpo=GrpoConfig(kl=0.1), optimizer=OPTIMIZER, ema_decay=0.5
    )


def ratios(remat):
    """Return the ratios of the first update after a rollout over both experts."""
    actor, lora, base = model(remat)
    networks = update.Networks(base=base, negative=NEGATIVE)
    differentiate = jax.jit(update.gradients, static_argnums=0, static_argnames="trained")
    given = (objective(actor), lora, networks, batch(remat=remat), SCHEDULE, jnp.int32(0))
    return np.asarray(differentiate(*given, trained=(0, 1))[1]["ratio"])


def two_experts(folder: Path, boundary: float = BOUNDARY) -> Path:
    """Write the bundled pipeline with a second transformer, whose weights are moved by noise."""
    shutil.copytree(EMBEDDED / "pipeline", folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    file, noise = folder / "transformer_2" / WEIGHTS, np.random.default_rng(5)
    tensors = {
        name: (value + 0.02 * noise.standard_normal(value.shape)).astype(value.dtype)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file)
    index = store.read_json(folder / "model_index.json")
    index |= {"transformer_2": index["transformer"], "boundary_ratio": boundary}
    store.write_json(folder / "model_index.json", index)
    return folder
