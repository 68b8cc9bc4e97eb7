"""Does a trick pay? The face reward of drawn clips after what a policy that games it could do, against the honest clips.

    python benchmarks/hacking.py [--clips 64] [--sheet FILE.png]

Held-out drawn people, two or three to a clip; each trick of `jax_idgrpo.preferences.corruptions` on every clip; paired differences of the
reward with 95 % bootstrap intervals over clips, for the default reward, for one that does not price copies of the photo, for one that
saturates where two photos of a person do, and for that with every penalty priced; and which share of faces counts as a copy.
--sheet: one clip after every trick, a row each.
"""

import argparse
import itertools
import sys

import jax
import numpy as np
from PIL import Image

from jax_idgrpo.config import PENALTIES, PENALTY_WEIGHTS, RewardConfig
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.preferences.clip_pairs import drawn
from jax_idgrpo.preferences.corruptions import DISTORTIONS, TRICKS, Subject
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.face_reward import FaceReward

Levels = tuple[RewardConfig, dict[str, float]]
PLAIN, SATURATING = RewardConfig(penalties={"copied": 0.0}), RewardConfig(similarity_high=0.75, penalties={"copied": 0.0})
REWARDS: dict[str, Levels] = {
    "default": (PLAIN, PENALTY_WEIGHTS),
    "copies unpriced": (PLAIN, {}),
    "saturating": (SATURATING, PENALTY_WEIGHTS),
    "saturating, priced": (SATURATING, dict.fromkeys(PENALTIES, 0.5)),
}
OPACITIES = (1.0, 0.75, 0.5, 0.25)
BATCH = 16


def score(reward: FaceReward, clips: list[Subject], videos: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The terms of the reward of every video, each [clips]."""
    found = []
    for start in range(0, len(clips), BATCH):
        part = clips[start : start + BATCH]
        photos, mask = (np.stack([getattr(clip, name) for clip in part]) for name in ("photos", "mask"))
        people = reward.encode_references(References.of_pixels(photos, mask), [""] * len(mask))
        found.append(jax.device_get(reward.score(np.stack(videos[start : start + BATCH]), people)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def columns(clips: list[Subject], videos: list[np.ndarray], made: list[tuple[RewardConfig, FaceReward]]) -> dict[str, np.ndarray]:
    """Every reward of `REWARDS`, and `copied`, each [clips]; the faces are found once for those that differ in their prices alone."""
    terms = [(config, score(reward, clips, videos)) for config, reward in made]
    of = {name: next(found for config, found in terms if config == level) for name, (level, _) in REWARDS.items()}
    costs = {name: sum(price * of[name][term] for term, price in prices.items()) for name, (_, prices) in REWARDS.items()}
    return {name: of[name]["reward"] - costs[name] for name in REWARDS} | {"copied": terms[0][1]["copied"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clips", type=int, default=64)
    options.add_argument("--sheet")
    arguments = options.parse_args()
    several = (takes.subjects[0] for takes in drawn(7, "eval") if len(takes.photos) > 1)
    clips = list(itertools.islice(several, arguments.clips))
    tricked = {f"paste, {share:.0%} opaque": [DISTORTIONS["paste"](clip, share) for clip in clips] for share in OPACITIES}
    tricked |= {name: [DISTORTIONS[name](clip) for clip in clips] for name in TRICKS if name != "paste"}
    if arguments.sheet:
        rows = [clips[0].video, *(videos[0] for videos in tricked.values())]
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        Image.fromarray(np.uint8((np.clip(picture, -1, 1) + 1) * 127.5)).save(arguments.sheet)
    print(f"{len(clips)} clips; change of the reward by a trick, with its 95 % interval, and the share of copies\n")
    made = [(config, factory.make_face_reward(config)) for config in (PLAIN, SATURATING)]
    honest = columns(clips, [clip.video for clip in clips], made)
    print("| trick |", " | ".join(honest), "|")
    print("| --- |" + " --- |" * len(honest))
    print("| honest: the reward |", " | ".join(f"{value.mean():.3f}" for value in honest.values()), "|")
    for trick, videos in tricked.items():
        found = columns(clips, videos, made)
        gains = [bootstrap.bootstrap(found[name] - honest[name], np.arange(len(clips)), 0, 2000).text(sign=True) for name in REWARDS]
        print(f"| {trick} |", " | ".join([*gains, f"{found['copied'].mean():.3f}"]), "|")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
