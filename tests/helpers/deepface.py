"""A photograph of a face, and a stand-in for deepface."""

import functools

import numpy as np
from PIL import Image
from skimage import data

from jax_idgrpo.rewards.faces import ARCFACE_TEMPLATE


@functools.cache
def astronaut(side=512):
    """Return a photograph of one face, RGB."""
    return np.asarray(
        Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.LANCZOS)
    )


def grey(picture):
    """Return a picture without its colours."""
    return np.repeat(np.round(picture.mean(-1, keepdims=True)).astype(np.uint8), 3, -1)


def fake(gate=None):
    """Faces whose embedding is the colour of the frame; the dark video breaks."""

    def faces(frames):
        if gate is not None:
            assert gate.wait(30)
        if frames.max() < 10:
            raise RuntimeError("too dark")
        colour = frames.reshape(len(frames), -1, 3).mean(1)
        embeddings = np.zeros((len(frames), 8, 3), np.float32)
        embeddings[:, 0] = colour / np.linalg.norm(colour, axis=-1, keepdims=True)
        boxes, landmarks = np.float32([4, 4, 40, 40]), np.asarray(ARCFACE_TEMPLATE, np.float32) / 3
        shown = np.arange(8) == np.zeros((len(frames), 1))
        return (
            np.tile(boxes, (len(frames), 8, 1)),
            np.tile(landmarks, (len(frames), 8, 1, 1)),
            embeddings,
            shown,
        )

    return faces
