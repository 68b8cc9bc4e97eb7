"""Does a trick pay? The face reward of drawn clips after what a policy that games it could do, against the honest clips.

    python benchmarks/hacking.py [--clips 64] [--sheet FILE.png]

Held-out drawn people, two or three to a clip; each trick of `jax_idgrpo.data.distortions` on every clip; paired differences of the
reward with 95 % bootstrap intervals over clips, for the default reward, for one that saturates where two photos of a person do, and for
that with every penalty priced. --sheet: one clip after every trick, a row each.
"""

import argparse
import sys

import jax
import numpy as np
from PIL import Image

from jax_idgrpo import evaluate, statistics
from jax_idgrpo.config import PENALTIES, RewardConfig
from jax_idgrpo.data import cast
from jax_idgrpo.data.distortions import DISTORTIONS, TRICKS, Subject
from jax_idgrpo.rewards import FaceReward, References
from jax_idgrpo.rewards.faces import load_stack

REWARDS = {
    "default": RewardConfig(),
    "saturating": RewardConfig(similarity_high=0.75),
    "saturating, priced": RewardConfig(similarity_high=0.75, penalties=dict.fromkeys(PENALTIES, 0.5)),
}
BATCH = 16


def subjects(count: int, stack) -> list[Subject]:
    """Clips with two or three people whose faces are seen throughout, and photos in which a face is found."""
    found: list[Subject] = []
    for step in range(1000):
        drawn = jax.device_get(cast.batch(7, step, BATCH, "eval"))
        photos = drawn.portraits.reshape(-1, 1, *drawn.portraits.shape[2:])
        faces = jax.device_get(stack(photos))
        boxes, seen = (leaf[:, 0, 0].reshape(*drawn.mask.shape, *leaf.shape[3:]) for leaf in (faces.boxes, faces.mask))
        for n in range(BATCH):
            mask = drawn.mask[n]
            if mask.sum() > 1 and seen[n][mask].all() and (drawn.visible[n][:, mask] > 0.9).all():
                stranger = drawn.video[n - 1], drawn.boxes[n - 1, :, 0]  # of the clip before
                found.append(Subject(drawn.video[n], drawn.boxes[n], mask, drawn.portraits[n], boxes[n], *stranger))
                if len(found) == count:
                    return found
    raise SystemExit(f"only {len(found)} clips of {count}")


def score(reward: FaceReward, clips: list[Subject], videos: list[np.ndarray]) -> np.ndarray:
    """The reward of every video, [clips]."""
    found = []
    for start in range(0, len(clips), BATCH):
        part = clips[start : start + BATCH]
        photos, mask = (np.stack([getattr(clip, name) for clip in part]) for name in ("photos", "mask"))
        embeddings = reward.embed_references(References(images=photos, mask=mask))
        found.append(np.asarray(reward.score_terms(np.stack(videos[start : start + BATCH]), embeddings, mask)["reward"]))
    return np.concatenate(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clips", type=int, default=64)
    options.add_argument("--sheet")
    arguments = options.parse_args()
    stack = load_stack(RewardConfig().folder(), "embedder")
    clips = subjects(arguments.clips, jax.jit(lambda photos: stack(photos)))
    tricked = {name: [DISTORTIONS[name](clip) for clip in clips] for name in TRICKS}
    if arguments.sheet:
        rows = [clips[0].video, *(videos[0] for videos in tricked.values())]
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        Image.fromarray(np.uint8((np.clip(picture, -1, 1) + 1) * 127.5)).save(arguments.sheet)
    print(f"{len(clips)} clips; change of the reward by a trick, with its 95 % interval\n")
    print("| trick |", " | ".join(REWARDS), "|")
    print("| --- |" + " --- |" * len(REWARDS))
    rewards = {name: evaluate.make_reward(config) for name, config in REWARDS.items()}
    honest = {name: score(reward, clips, [clip.video for clip in clips]) for name, reward in rewards.items()}
    print("| honest: the reward |", " | ".join(f"{value.mean():.3f}" for value in honest.values()), "|")
    for trick, videos in tricked.items():
        cells = []
        for name, reward in rewards.items():
            gain = score(reward, clips, videos) - honest[name]
            cells.append(statistics.bootstrap(gain, np.arange(len(clips)), 0, 2000).text(sign=True))
        print(f"| {trick} |", " | ".join(cells), "|")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
