"""Make all random numbers of the project.

Every draw is a pure function of the seed and of its purpose, so a run does not depend on the mesh,
on the batch order or on interruptions. All keys are Threefry keys, whose bits do not change under
`vmap` or sharding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_DOMAINS = (
    "init",
    "noise",
    "window",
    "data",
    "augment",
    "bootstrap",
    "evaluate",
    "forward",
    "photo",
)


def key(seed: int | Int[Array, ""], domain: str) -> Key[Array, ""]:
    """Make the root key of one kind of draw; `domain` is one of `_DOMAINS`."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _DOMAINS.index(domain))


def fold(root: Key[Array, ""], *numbers: int | Int[Array, ""]) -> Key[Array, ""]:
    """Fold non-negative integers into `root`, one after another."""
    for number in numbers:
        root = jax.random.fold_in(root, number)
    return root


def row_keys(
    root: Key[Array, ""], prompts: Int[Array, " B"], members: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Make one key per video.

    Args:
      root: root key of the draws.
      prompts: [B] ids of the prompts.
      members: [B] numbers of the videos in their groups.
    """
    return jax.vmap(lambda prompt, member: fold(root, prompt, member))(prompts, members)


def step_noise(
    rows: Key[Array, " B"], step: int | Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "B ..."]:
    """Draw standard normal noise [B, *shape] of a denoising step.

    A row's noise does not depend on the other rows. A longer leading axis only appends noise.

    Args:
      rows: keys from `row_keys`.
      step: 0, 1, ...; -1 for the initial noise.
      shape: shape of a row's noise.
    """
    return jax.vmap(
        lambda row: jax.random.normal(jax.random.fold_in(row, step + 1), shape, jnp.float32)
    )(rows)


def step_uniform(rows: Key[Array, " B"], step: int | Int[Array, ""]) -> Float[Array, " B"]:
    """Draw one number in [0, 1) per row at step `step` (0, 1, ...), independent of `step_noise`."""
    return jax.vmap(lambda row: jax.random.uniform(fold(row, 2**31 - 1, step)))(rows)
