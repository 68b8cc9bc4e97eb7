"""Benchmark decoding and encoding with the VAE of Wan against diffusers on PyTorch.

Both sides load the same random checkpoint of the published size and get the same latents and video
in float32, alternating in one process. The figure is the ratio of medians, ours over theirs.
Requires the `test` extra:

    python -m benchmarks.vae [--frames 3] [--size 8] [--rounds 3]

frames, size: number and side of the latent frames. A video has 4 (frames - 1) + 1 frames of
8 size x 8 size pixels.
"""

import argparse
import tempfile
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.timing import medians
from jax_idgrpo.models.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from jax_idgrpo.sampling.pipeline import load_vae


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("frames", 3), ("size", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    rng, frames, size = np.random.default_rng(0), arguments.frames, arguments.size
    pixels = PIXELS_PER_LATENT * size
    latents = rng.standard_normal((1, frames, size, size, 16), np.float32)
    video = rng.uniform(-1, 1, (1, 1 + FRAMES_PER_LATENT * (frames - 1), pixels, pixels, 3)).astype(
        np.float32
    )

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = diffusers.AutoencoderKLWan().eval()
        theirs.save_pretrained(Path(folder) / "vae")
        graph, state = nnx.split(load_vae(folder))
    mean, std = (
        torch.tensor(getattr(theirs.config, name)).reshape(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    channels_first = {
        name: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
        for name, x in (("latents", latents), ("video", video))
    }
    decode = jax.jit(lambda state, x: nnx.merge(graph, state).decode(x))
    encode = jax.jit(lambda state, x: nnx.merge(graph, state).encode(x))

    calls = {
        "decode": (
            lambda: jax.block_until_ready(decode(state, jnp.asarray(latents))),
            torch.no_grad()(lambda: theirs.decode(channels_first["latents"] * std + mean).sample),
        ),
        "encode": (
            lambda: jax.block_until_ready(encode(state, jnp.asarray(video))),
            torch.no_grad()(
                lambda: (theirs.encode(channels_first["video"]).latent_dist.mode() - mean) / std
            ),
        ),
    }
    print(f"{video.shape[1]} frames of {pixels} x {pixels}, float32")
    for name, (our_call, their_call) in calls.items():
        want = np.moveaxis(their_call().numpy(), 1, -1)
        difference = np.linalg.norm(our_call() - want) / np.linalg.norm(want)
        found = medians(arguments.rounds, ours=our_call, theirs=their_call)
        print(
            f"{name}: ours {found['ours']:.3f} s, theirs {found['theirs']:.3f} s, "
            f"ratio {found['ours'] / found['theirs']:.2f}; relative difference {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
