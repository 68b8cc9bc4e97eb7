"""One forward pass of the full-size vision-language reward in bfloat16 with random weights: seconds and peak memory.

    python benchmarks/vlm.py --photo 8 8 --frame 8 8 --tokens 128

photo, frame: height and width in patches of 14 pixels of one photo and of each of the two temporal grids of a video. tokens: length of the
sequence, vision tokens among them. The published sizes are --photo 36 36 --frame 18 30 --tokens 1024 for a 512 x 512 photo and a video of
240 x 416 pixels. On a CPU set the XLA_FLAGS that benchmarks/RESULTS.md names: without them all weights are held in float32 as well.
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


def drawn(leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """A leaf of random numbers of the size of a trained network's, from one block of them over and over: quick to make."""
    fan = leaf.shape[-2] if len(leaf.shape) > 1 else 1
    block = (rng.normal(size=1 << 16) * (0.02 if fan == 1 else fan**-0.5)).astype(leaf.dtype)
    return jnp.asarray(np.resize(block, leaf.shape))


def grids(
    config: QwenConfig, height: int, width: int, count: int, rng: np.random.Generator
) -> Grids:
    """`count` grids of random pixels."""
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
    state = jax.tree.map(lambda leaf: drawn(leaf, rng), abstract)
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(state)):,} parameters, {time.monotonic() - began:.0f} s to draw",
        flush=True,
    )
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
            f"{number} pass: {time.monotonic() - began:.1f} s, score {score:.4f}, peak {peak:.1f} GiB resident",
            flush=True,
        )


if __name__ == "__main__":
    main()
