r"""Define a custom reward: one function of videos, prompts and reference photos.

    idgrpo train configs/quickstart.py --workdir runs/mine \
        --reward.custom examples/custom_reward.py:score

The function runs on the host while the accelerator samples the next videos. This example rewards
motion and colours similar to those of the photos; replace it by your own network.
"""

import numpy as np


def mean_colour(pixels):
    """Compute the mean colour of pictures with values in [-1, 1]."""
    return pixels.reshape(-1, 3).mean(axis=0)


def score(videos, prompts, references):
    """Score videos; higher is better.

    Args:
      videos: float32 [B, frames, height, width, 3] in [-1, 1].
      prompts: B texts.
      references: B lists of reference photos (`PIL.Image`).

    Returns:
      {"reward": [B], ...}: the reward, and further values to log.
    """
    colour = []
    for video, photos in zip(videos, references):
        target = np.mean([mean_colour(np.asarray(photo) / 127.5 - 1) for photo in photos], axis=0)
        colour.append(-np.abs(mean_colour(video) - target).mean())
    motion = np.abs(np.diff(videos, axis=1)).mean(axis=(1, 2, 3, 4))
    colour = np.asarray(colour)
    return {"reward": colour + motion, "colour": colour, "motion": motion}
