"""Measure whether reward hacks pay: the face reward of corrupted against uncorrupted clips.

    python benchmarks/hacking.py [--clips 64] [--sheet FILE.png]

The clips show two or three held-out synthetic people. Each trick of
`jax_idgrpo.preferences.corruptions` is applied to every clip. The table has the paired differences
of the reward with 95 % bootstrap intervals over clips, and the share of faces detected as copies of
the photo. The rewards are the default, one without the penalty for copies, one that saturates at
the similarity of two photos of a person, and the latter with all penalties.

--sheet: write a picture of one clip after every trick, one row each.
"""

import argparse
import itertools
import sys

import jax
import numpy as np
from PIL import Image

from jax_idgrpo.config import PENALTIES, PENALTY_WEIGHTS, RewardConfig
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.preferences.clip_pairs import from_synthetic
from jax_idgrpo.preferences.corruptions import DISTORTIONS, TRICKS, AnnotatedClip
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.face_reward import FaceReward

Levels = tuple[RewardConfig, dict[str, float]]
PLAIN, SATURATING = (
    RewardConfig(penalties={"copied": 0.0}),
    RewardConfig(similarity_high=0.75, penalties={"copied": 0.0}),
)
REWARDS: dict[str, Levels] = {
    "default": (PLAIN, PENALTY_WEIGHTS),
    "copies unpriced": (PLAIN, {}),
    "saturating": (SATURATING, PENALTY_WEIGHTS),
    "saturating, priced": (SATURATING, dict.fromkeys(PENALTIES, 0.5)),
}
OPACITIES = (1.0, 0.75, 0.5, 0.25)
BATCH = 16


def score(
    reward: FaceReward, clips: list[AnnotatedClip], videos: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """Compute the reward's terms of every video, each [clips].

    Args:
      reward: face reward.
      clips: supply the photos.
      videos: frames to score, one video per clip.
    """
    found = []
    for start in range(0, len(clips), BATCH):
        part = clips[start : start + BATCH]
        photos, mask = (
            np.stack([getattr(clip, name) for clip in part]) for name in ("photos", "mask")
        )
        people = reward.encode_references(References.of_pixels(photos, mask), [""] * len(mask))
        found.append(jax.device_get(reward.score(np.stack(videos[start : start + BATCH]), people)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def columns(
    clips: list[AnnotatedClip],
    videos: list[np.ndarray],
    made: list[tuple[RewardConfig, FaceReward]],
) -> dict[str, np.ndarray]:
    """Compute every reward of `REWARDS` and `copied`, each [clips].

    Rewards that differ only in penalty weights share one face detection.

    Args:
      clips: supply the photos.
      videos: frames to score, one video per clip.
      made: face rewards with their configurations.
    """
    terms = [(config, score(reward, clips, videos)) for config, reward in made]
    of = {
        name: next(found for config, found in terms if config == level)
        for name, (level, _) in REWARDS.items()
    }
    costs = {
        name: sum(price * of[name][term] for term, price in prices.items())
        for name, (_, prices) in REWARDS.items()
    }
    return {name: of[name]["reward"] - costs[name] for name in REWARDS} | {
        "copied": terms[0][1]["copied"]
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--clips", type=int, default=64)
    options.add_argument("--sheet")
    arguments = options.parse_args()
    several = (
        clip_pair.clips[0] for clip_pair in from_synthetic(7, "eval") if len(clip_pair.photos) > 1
    )
    clips = list(itertools.islice(several, arguments.clips))
    tricked = {
        f"paste, {share:.0%} opaque": [DISTORTIONS["paste"](clip, share) for clip in clips]
        for share in OPACITIES
    }
    tricked |= {
        name: [DISTORTIONS[name](clip) for clip in clips] for name in TRICKS if name != "paste"
    }
    if arguments.sheet:
        rows = [clips[0].video, *(videos[0] for videos in tricked.values())]
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        Image.fromarray(np.uint8((np.clip(picture, -1, 1) + 1) * 127.5)).save(arguments.sheet)
    print(
        f"{len(clips)} clips; change of the reward by a trick, with its 95 % interval, "
        "and the share of copies\n"
    )
    made = [(config, factory.make_face_reward(config)) for config in (PLAIN, SATURATING)]
    honest = columns(clips, [clip.video for clip in clips], made)
    print("| trick |", " | ".join(honest), "|")
    print("| --- |" + " --- |" * len(honest))
    print(
        "| honest: the reward |",
        " | ".join(f"{value.mean():.3f}" for value in honest.values()),
        "|",
    )
    for trick, videos in tricked.items():
        found = columns(clips, videos, made)
        gains = [
            bootstrap.bootstrap(found[name] - honest[name], np.arange(len(clips)), 0, 2000).text(
                sign=True
            )
            for name in REWARDS
        ]
        print(f"| {trick} |", " | ".join([*gains, f"{found['copied'].mean():.3f}"]), "|")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
