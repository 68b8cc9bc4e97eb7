"""Does a trick pay? The face reward of drawn clips after what a policy that games it could do, against the honest clips.

    python benchmarks/hacking.py [--clips 64] [--sheet FILE.png]

Held-out drawn people, two or three to a clip; each trick of `jax_idgrpo.data.distortions` on every clip; paired differences of the
reward with 95 % bootstrap intervals over clips, for the default reward, for one that saturates where two photos of a person do, and for
that with every penalty priced. --sheet: one clip after every trick, a row each.
"""

import argparse
import itertools
import sys

import numpy as np
from PIL import Image

from jax_idgrpo import evaluate, statistics
from jax_idgrpo.config import PENALTIES, RewardConfig
from jax_idgrpo.data.distortions import DISTORTIONS, TRICKS, Subject
from jax_idgrpo.pairs import subjects
from jax_idgrpo.rewards import FaceReward, References

REWARDS = {
    "default": RewardConfig(),
    "saturating": RewardConfig(similarity_high=0.75),
    "saturating, priced": RewardConfig(similarity_high=0.75, penalties=dict.fromkeys(PENALTIES, 0.5)),
}
BATCH = 16


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
    several = (subject for subject, _ in subjects(7, "eval") if len(subject.people) > 1)
    clips = list(itertools.islice(several, arguments.clips))
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
