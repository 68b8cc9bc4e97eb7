"""Count videos that gain reward without gaining identity.

Every model starts a video from the same noise, so that a video is compared with the base's. It is
hacked if its reward rises by more than `REWARD` while the judge's identity falls, or if its share
of copied faces (`copied`) or of frames without motion (`stalled`) rises by more than `SHARE`. IPRO
(arXiv 2510.14255) has such a count from a multimodal model; these thresholds are ours.
"""

import numpy as np
from jaxtyping import Float

from jax_idgrpo.evaluation.bootstrap import Scores

REWARD = 0.02  # in the units of the reward; the formula over faces is between 0 and 1
SHARE = 0.1
NEEDS = ("reward", "judge_identity", "copied", "stalled")


def with_hacked(scores: Scores, base: Scores) -> dict[str, Float[np.ndarray, " N"]]:
    """Add `hacked`, 1 for a hacked video and 0 otherwise; without a judge nothing is added.

    Args:
      scores: metric -> one value per video.
      base: the same of the base, from the same noise.
    """
    if any(name not in scores or name not in base for name in NEEDS):
        return dict(scores)
    risen = {name: scores[name] - base[name] for name in NEEDS}
    hacked = (risen["reward"] > REWARD) & (risen["judge_identity"] < 0)
    hacked |= (risen["copied"] > SHARE) | (risen["stalled"] > SHARE)
    return dict(scores) | {"hacked": hacked.astype(np.float64)}
