"""Run by test_streaming.py in a process with eight devices: scores of the same videos on several meshes, stored as arrays.

python -m tests.helpers.scoring_worker OUT
"""

import math
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from jax_idgrpo.config import Config, DataConfig, MeshConfig
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.evaluation import sampler, scoring
from jax_idgrpo.models.faces.arcface import ArcFace
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.identity import IdentityConfig
from tests.helpers.small_faces import SMALL_ARCFACE, small_stack

MESHES = {
    "data8": dict(data=8),
    "data2-fsdp2-seq2": dict(data=2, fsdp=2, seq=2),
    "fsdp4-tensor2": dict(data=1, fsdp=4, tensor=2),
}
ROWS = 8


def main(out: str) -> None:
    rng = np.random.default_rng(0)
    videos = rng.uniform(-1, 1, (ROWS, 5, 4, 6, 3)).astype(np.float32).repeat(8, 2).repeat(8, 3)

    def made(frames: int, mesh: jax.sharding.Mesh | None) -> FaceReward:
        stack = small_stack()
        # The embedder of `small_stack` gives all faces a cosine of 1, so that rounding would decide which face is whose.
        stack.embedder = ArcFace(SMALL_ARCFACE, rngs=nnx.Rngs(0))
        reward = FaceReward(stack, IdentityConfig(), frames)
        if mesh is not None:
            reward.state = sharding.device_put_global(reward.state, sharding.replicated(mesh))
        return reward

    scoring.make_reward = lambda config, mesh=None: made(2, mesh)
    scoring.make_judge = lambda config, mesh=None: made(0, mesh)
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = []
        for n in range(3):
            photos.append(Path(folder) / f"{n}.png")
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((128, 128)).save(
                photos[-1]
            )
        prompts = [
            Prompt(n // 2, f"prompt {n // 2}", tuple(photos[: 1 + n // 2 % 3])) for n in range(ROWS)
        ]
        config = Config(data=DataConfig(max_people=3))
        for name, value in scoring.make_scorer(config, ROWS)(videos, prompts).items():
            found[f"one/{name}"] = value
        for label, sizes in MESHES.items():
            mesh = sharding.make_mesh(MeshConfig(**sizes))
            placed = sharding.device_put_global(videos, sharding.batch_sharding(mesh))
            scorer = scoring.make_scorer(config, ROWS, mesh)
            terms = [
                scorer.terms(reward, placed, prompts) for reward in (scorer.reward, scorer.judge)
            ]
            found[f"{label}/devices"] = np.array(
                [len(term["reward"].sharding.device_set) for term in terms]
            )
            found[f"{label}/rows"] = np.array(
                terms[1]["reward"].addressable_shards[0].data.shape[0]
            )
            for name, value in scorer(placed, prompts).items():
                found[f"{label}/{name}"] = value
            fetched = [
                np.array_equal(sampler.fetch(placed, n), to_uint8(videos[n])) for n in range(ROWS)
            ]
            found[f"{label}/fetched"] = np.array(fetched)
            empty = jax.tree.map(
                lambda leaf: np.zeros(leaf.shape, leaf.dtype), scorer.judge.shapes(ROWS, 3)
            )
            people = sharding.device_put_global(empty, sharding.batch_sharding(mesh))
            judge = jax.jit(scorer.judge.apply)
            program = judge.lower(scorer.judge.state, placed, people).compile().as_text()
            gathered = re.findall(r"\w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", program)
            sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
            found[f"{label}/gathered"] = np.array(max(sizes, default=0))
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1])
