"""Measure seconds and peak memory of a forward pass of the full-size vision-language reward.

    python benchmarks/vlm.py --photo 8 8 --frame 8 8 --tokens 128

The weights are random, in bfloat16. photo, frame: height and width, in patches of 14 pixels, of one
photo and of each of the two temporal grids of a video. tokens: length of the sequence, including
vision tokens. The published sizes are --photo 36 36 --frame 18 30 --tokens 1024 for a 512 x 512
photo and a video of 240 x 416 pixels. On a CPU set the XLA_FLAGS of benchmarks/RESULTS.md: without
them XLA additionally stores all weights in float32.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.qwen_vl import Grids, QwenConfig, QwenReward, Sequences, grid_tables, windows


def random_leaf(leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """Fill a leaf with random numbers of realistic scale; repeats one block, which is fast."""
    fan = leaf.shape[-2] if len(leaf.shape) > 1 else 1
    block = (rng.normal(size=1 << 16) * (0.02 if fan == 1 else fan**-0.5)).astype(leaf.dtype)
    return jnp.asarray(np.resize(block, leaf.shape))


def grids(
    config: QwenConfig, height: int, width: int, count: int, rng: np.random.Generator
) -> Grids:
    """Make grids of random pixels.

    Args:
      config: configuration of the network.
      height, width: size in patches.
      count: number of grids.
      rng: random generator.
    """
    tables = grid_tables(
        height, width, config.vision, height * width, len(windows(height, width, config.vision))
    )
    stacked = {
        name: jnp.asarray(np.repeat(table[None], count, 0)) for name, table in tables.items()
    }
    return Grids(
        patches=jnp.asarray(
            rng.normal(size=(count, height * width, config.vision.features)), jnp.float32
        ),
        **stacked,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("photo", "frame"):
        parser.add_argument(f"--{name}", type=int, nargs=2, default=(8, 8))
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    config, rng = QwenConfig(), np.random.default_rng(0)
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: QwenReward(config, dtypes=Dtypes.named("bfloat16"), rngs=nnx.Rngs(0))
        )
    )
    began = time.monotonic()
    state = jax.tree.map(lambda leaf: random_leaf(leaf, rng), abstract)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state))
    print(f"{parameters:,} parameters, {time.monotonic() - began:.0f} s to initialise", flush=True)
    photo, frames = grids(config, *given.photo, 1, rng), grids(config, *given.frame, 2, rng)
    seen = (given.photo[0] * given.photo[1] + 2 * given.frame[0] * given.frame[1]) // 4
    order = np.arange(given.tokens)
    sequences = Sequences(
        ids=jnp.asarray(rng.integers(0, 1000, (1, given.tokens))),
        vision=jnp.asarray(np.where(order < seen, order, -1)[None]),
        position=jnp.asarray(np.broadcast_to(order, (3, 1, given.tokens))),
        token=jnp.asarray([[given.tokens - 1]]),
        mask=jnp.ones((1, given.tokens), bool),
    )
    program = (
        jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
        .lower(state, sequences, photo, frames)
        .compile()
    )
    for number in ("first", "second"):
        began = time.monotonic()
        score = float(program(state, sequences, photo, frames)[0, 0, 0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{number} pass: {time.monotonic() - began:.1f} s, score {score:.4f}, "
            f"peak {peak:.1f} GiB resident",
            flush=True,
        )


if __name__ == "__main__":
    main()
