"""A reward of your own: one function of videos, prompts and reference photos.

    idgrpo train configs/quickstart.py --workdir runs/mine --reward.custom examples/custom_reward.py:score

It runs on the host while the accelerator samples the next videos. This one pays for colours like those of the photos, and for videos that
move; put your own network in its place.
"""

import numpy as np


def mean_colour(pixels):
    """The mean colour of pictures with values in [-1, 1]."""
    return pixels.reshape(-1, 3).mean(axis=0)


def score(videos, prompts, references):
    """Score videos, higher is better.

    Args:
      videos: float32 [B, frames, height, width, 3] in [-1, 1].
      prompts: B texts.
      references: for each video its reference photos, a list of `PIL.Image`s.

    Returns:
      {"reward": [B], ...}: the reward, and whatever else is worth logging.
    """
    colour = []
    for video, photos in zip(videos, references):
        wanted = np.mean([mean_colour(np.asarray(photo) / 127.5 - 1) for photo in photos], axis=0)
        colour.append(-np.abs(mean_colour(video) - wanted).mean())
    motion = np.abs(np.diff(videos, axis=1)).mean(axis=(1, 2, 3, 4))
    colour = np.asarray(colour)
    return {"reward": colour + motion, "colour": colour, "motion": motion}
