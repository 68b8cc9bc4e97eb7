"""The only place that makes randomness.

Every draw is a pure function of the seed and of what it is for, so a run does not depend on the mesh, the batch order or on
having been interrupted. Threefry keys are used throughout: their bits do not change under `vmap` or sharding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_DOMAINS = ("init", "noise", "window", "data", "augment", "bootstrap", "evaluate", "forward")


def key(seed: int | Int[Array, ""], domain: str) -> Key[Array, ""]:
    """The root key of one kind of draw; `domain` is one of init, noise, window, data, augment, bootstrap, evaluate, forward."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _DOMAINS.index(domain))


def fold(root: Key[Array, ""], *numbers: int | Int[Array, ""]) -> Key[Array, ""]:
    """`root` folded with each number in turn; numbers are non-negative integers."""
    for number in numbers:
        root = jax.random.fold_in(root, number)
    return root


def row_keys(
    root: Key[Array, ""], prompts: Int[Array, "B"], members: Int[Array, "B"]
) -> Key[Array, "B"]:
    """One key per video, from its prompt's id and its number in the group."""
    return jax.vmap(lambda prompt, member: fold(root, prompt, member))(prompts, members)


def step_noise(
    rows: Key[Array, "B"], step: int | Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "B ..."]:
    """Standard normal noise [B, *shape] of denoising step `step` (0, 1, ...); step -1 is the start noise.

    A row's noise does not depend on the other rows, and a longer leading axis only appends to it.
    """
    return jax.vmap(
        lambda row: jax.random.normal(jax.random.fold_in(row, step + 1), shape, jnp.float32)
    )(rows)


def step_uniform(rows: Key[Array, "B"], step: int | Int[Array, ""]) -> Float[Array, "B"]:
    """One number in [0, 1) per row at step `step` (0, 1, ...), independent of `step_noise` of the same rows."""
    return jax.vmap(lambda row: jax.random.uniform(fold(row, 2**31 - 1, step)))(rows)
