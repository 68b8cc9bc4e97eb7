"""A process with three devices: the same scores from one device, from weights divided over two, and from a slice of its own beside a run.

Usage: python -m tests.helpers.vlm_worker FOLDER, which holds `reward/` and `base/`; writes FOLDER/scores.npz.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=3 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    photos = tuple(
        (Photo(Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))),) for _ in range(3)
    )
    videos = rng.uniform(-1, 1, (3, 5, 64, 64, 3)).astype(np.float32)
    references = References(photos, 1)

    def scores(own: int, mesh: jax.sharding.Mesh | None) -> tuple[np.ndarray, int]:
        reward = c.RewardConfig(
            vlm=str(folder / "reward"),
            vlm_base=str(folder / "base"),
            vlm_dtype="float32",
            vlm_devices=own,
        )
        model = factory.make_vlm(c.Config(reward=reward), mesh)
        encoded = model.encode_references(references, [""] * 3, videos.shape[1:4])
        found = model.score(jax.device_put(videos, jax.devices()[0]), encoded)["reward"]
        kernels = [leaf for leaf in jax.tree.leaves(model.state) if leaf.ndim == 3]
        return np.asarray(found), len(
            {str(shard.index) for shard in kernels[0].addressable_shards} if own or mesh else {0}
        )

    two = sharding.make_mesh(c.MeshConfig(data=1, fsdp=-1), jax.devices()[:2])
    results = {"one": scores(0, None), "divided": scores(0, two), "own": scores(2, None)}
    np.savez(
        folder / "scores.npz",
        **{name: value for name, (value, _) in results.items()},
        parts=[count for _, count in results.values()],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
