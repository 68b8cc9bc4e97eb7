"""Benchmark a whole GRPO step (rollout, decoding, face reward, update) against PyTorch.

The PyTorch side uses diffusers, peft and deepface. Both sides load the same random float32 weights:
the transformer of `transformer.py`, a VAE with narrow channels, RetinaFace-R50 and ArcFace-R34. A
step samples one group with guidance, decodes its videos, detects and embeds the faces of a few
frames, scores their similarity to two people under the best assignment, and updates the adapter
with the group's advantages. deepface processes one frame at a time. The sides alternate in one
process; the figures are medians of each phase. Requires the `test` extra:

    python -m benchmarks.step [--rows 2] [--steps 4] [--looked 1] [--rounds 3] [--compile]

looked: frames per video that the reward scores. With random weights the detected faces are
arbitrary and the rewards meaningless; see `faces.py`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from scipy.optimize import linear_sum_assignment

from benchmarks import transformer
from benchmarks.faces import calibrate, write_weights
from checkpoints_convert.face_folder import write_folder
from jax_idgrpo import grpo
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.parallel.hosts import trim_heap_after_compile
from jax_idgrpo.rewards.base import ReferenceFaces, frame_numbers
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import load_stack
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.rewards.photo_copy import SIDE
from jax_idgrpo.sampling import rollout
from jax_idgrpo.sampling.pipeline import load_vae

PHASES = ("rollout", "decode", "reward", "update")
PEOPLE = 2
SIZE = transformer.SIZES["40m"]
VAE_CHANNELS = 32  # published: 96, whose decoding would dominate the time on a CPU


def step(
    side: transformer.Side, decode: Callable[[Any], Any], reward: Callable[[Any], np.ndarray]
) -> dict[str, float]:
    """Run a step; returns the seconds of each phase.

    Args:
      side: transformer, rollout and update.
      decode: decodes latents to videos.
      reward: scores videos.
    """
    times = [time.perf_counter()]
    trajectory = side.sample()
    times.append(time.perf_counter())
    videos = decode(side.latents(trajectory))
    times.append(time.perf_counter())
    rewards = reward(videos)
    times.append(time.perf_counter())
    side.learn(
        trajectory, np.asarray(grpo.advantages(rewards, np.zeros(len(rewards), int)), np.float32)
    )
    times.append(time.perf_counter())
    return dict(zip(PHASES, np.diff(times).tolist(), strict=True))


def our_reward(
    home: Path, looked: int, people: np.ndarray, rows: int
) -> tuple[Callable[[Any], Any], Callable[[Any], np.ndarray]]:
    """Build decoding and reward of this package.

    Args:
      home: folder of the weights.
      looked: frames per video that the reward scores.
      people: embeddings of the people to match.
      rows: number of videos.
    """
    vae = nnx.split(load_vae(home))
    reward = FaceReward(load_stack(home / "ours", "embedder"), IdentityConfig(), looked)
    everywhere = np.broadcast_to(people, (rows, *people.shape))
    mask = np.ones((rows, len(people)), bool)
    faces = ReferenceFaces(
        jnp.asarray(everywhere), jnp.zeros((rows, len(people), SIDE, SIDE, 3)), mask
    )
    start = jnp.zeros(rows, jnp.int32)

    def decode(latents: jax.Array) -> jax.Array:
        return jax.block_until_ready(rollout.decode(vae, latents, start, SIZE.shape[0]))

    def score(videos: jax.Array) -> np.ndarray:
        return np.asarray(reward.score(videos, faces)["reward"])

    return decode, score


def their_reward(home: Path, looked: int, people: np.ndarray) -> tuple[Callable[..., Any], ...]:
    """Build decoding by diffusers and the reward by deepface.

    Args:
      home: folder of the weights.
      looked: frames per video that the reward scores.
      people: embeddings of the people to match.
    """
    from deepface import DeepFace

    vae = diffusers.AutoencoderKLWan.from_pretrained(home / "vae").eval()
    mean, std = (
        torch.tensor(getattr(vae.config, name)).reshape(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    DeepFace.build_model("retinaface", "face_detector")
    DeepFace.build_model("ArcFace")

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> np.ndarray:
        return to_uint8(np.moveaxis(vae.decode(latents * std + mean).sample.numpy(), 1, -1))

    def likeness(frame: np.ndarray) -> float:
        found = DeepFace.represent(
            frame[..., ::-1],
            "ArcFace",
            detector_backend="retinaface",
            enforce_detection=False,
            max_faces=PEOPLE,
        )
        faces = np.asarray([face["embedding"] for face in found])
        cosine = people @ (faces / np.linalg.norm(faces, axis=1, keepdims=True)).T
        return float(cosine[linear_sum_assignment(-cosine)].sum() / len(people))

    def score(videos: np.ndarray) -> np.ndarray:
        seen = frame_numbers(videos.shape[1], looked)
        return np.asarray(
            [np.mean([likeness(video[number]) for number in seen]) for video in videos]
        )

    return decode, score


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 2), ("steps", 4), ("looked", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of their transformer's blocks"
    )
    arguments = parser.parse_args()

    trim_heap_after_compile()  # as in every command of this package
    torch.manual_seed(0)
    given = transformer.inputs(arguments.rows, SIZE)
    people = np.random.default_rng(1).standard_normal((PEOPLE, 512)).astype(np.float32)
    people /= np.linalg.norm(people, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ |= {"DEEPFACE_HOME": folder, "DEEPFACE_BACKEND_ENGINE": "pytorch"}
        transformer.write_transformer(folder, SIZE)
        diffusers.AutoencoderKLWan(base_dim=VAE_CHANNELS).save_pretrained(home / "vae")
        files = write_weights(home)
        theirs = transformer.theirs(
            transformer.their_network(SIZE, folder), given, arguments.steps, SIZE, arguments.compile
        )
        calibrate(
            files / "retinaface.pth",
            PEOPLE,
            np.random.default_rng(2).integers(0, 256, (128, 128, 3), np.uint8),
        )
        write_folder(home / "ours", files / "retinaface.pth", files / "arcface_weights.pth", None)
        eyes = {
            "ours": our_reward(home, arguments.looked, people, arguments.rows),
            "theirs": their_reward(home, arguments.looked, people),
        }
        network = transformer.our_network(SIZE, folder)
        ours = transformer.ours(network, given, arguments.steps, SIZE)
        sides = {"ours": ours, "theirs": theirs}

    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):
        for name, side in sides.items():
            seconds[name].append(step(side, *eyes[name]))
            total = sum(seconds[name][-1].values())
            print(
                f"round {number} of {arguments.rounds}, {name}: {total:.1f} s",
                flush=True,
            )
    found = {
        name: {phase: statistics.median(row[phase] for row in rows[1:]) for phase in PHASES}
        | {"step": statistics.median(sum(row.values()) for row in rows[1:])}
        for name, rows in seconds.items()
    }
    print("\n| | ours | PyTorch | ratio of medians |\n| --- | --- | --- | --- |")
    for phase in (*PHASES, "step"):
        ours, other = (found[name][phase] for name in ("ours", "theirs"))
        print(f"| {phase} | {ours:.3f} s | {other:.3f} s | {ours / other:.2f} |")


if __name__ == "__main__":
    main()
