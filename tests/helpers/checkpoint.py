"""A small training state, whether two are equal, and damage to a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.config import OptimizerConfig
from jax_idgrpo.training.state import TrainState, make_optimizer, start

WIDE = 20_000
"""Wide enough for orbax to store numbers in files of their own."""


def make_state(seed: int, width: int = 3) -> TrainState:
    """A state of a small network, of other numbers for every seed."""
    random = np.random.default_rng(seed)
    params = {
        "blocks": {"kernel": nnx.Param(jnp.asarray(random.normal(size=(2, width)), jnp.float32))},
        "scale": jnp.float32(seed),
    }
    state = start(
        make_optimizer(OptimizerConfig(), 10),
        nnx.State(params),
        {"key": jax.random.key(seed), "count": jnp.uint32(seed)},
    )
    return state.replace(step=jnp.int32(seed), ema=jax.tree.map(lambda x: x + 1, state.ema))


def same(a: TrainState, b: TrainState) -> bool:
    """Return whether two states are equal in dtypes and bits."""

    def bits(x):
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(bits(x), bits(y)), a, b)
    return all(jax.tree.leaves(equal))


def truncate_part(workdir: Path, step: int, process: int) -> None:
    """Cut the largest file that one process wrote of a checkpoint in half."""
    part = workdir / "checkpoints" / str(step) / "default" / f"ocdbt.process_{process}"
    largest = max((part / "d").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def assert_fell_back(answers: Sequence[Mapping[str, object]], workdir: Path) -> None:
    """All processes of `checkpoint_worker` read step 3, because step 6 is damaged, and wrote step 6 anew.

    Args:
      answers: what each of them printed.
      workdir: its argument.
    """
    for answer in answers:
        assert answer["step"] == 3
        assert answer["exact"]
        (warned,) = answer["warned"]
        assert "trying the one before" in warned
        assert "process" in warned
        assert answer["steps"] == [3, 6]
        assert answer["again"]
    assert [path.name for path in (workdir / "checkpoints-damaged").iterdir()] == ["6"]
