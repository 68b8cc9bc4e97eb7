"""Films of drawn people with known cuts and faults."""

import itertools

import numpy as np
from PIL import Image, ImageFilter

from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.preferences.clip_pairs import Shape, from_synthetic
from jax_idgrpo.preferences.corruptions import DISTORTIONS

SIZE, FRAMES, FPS = 64, 24, 8
REASONS = {
    "dark": "dark",
    "bright": "bright",
    "blurred": "blurred",
    "freeze": "still",
    "nobody": "nobody",
    "swap": "exchanged",
    "duplicate": "the same person twice",
}
"""Fault of a clip -> reason for which `idgrpo ingest` leaves it out."""


def drawn_clips(seed, people=None, split="train"):
    """Yield drawn clips without end; with `people`, those with so many people."""
    for pair in from_synthetic(seed, split, Shape(frames=FRAMES, size=(SIZE, SIZE), fps=FPS)):
        if people is None or len(pair.photos) == people:
            yield pair


def faulty(pair, fault, variant=0):
    """The pixels of one of the two clips of a pair with a fault, or without for ""."""
    clip = pair.clips[variant]
    if fault in ("swap", "duplicate", "freeze", "replace"):
        return to_uint8(DISTORTIONS[fault](clip, 0.5 if fault in ("swap", "replace") else 1.0))
    pixels = to_uint8(clip.video)
    if fault == "dark":
        return pixels // 32
    if fault == "bright":
        return 255 - pixels // 8
    if fault == "blurred":
        return np.stack(
            [np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(4))) for f in pixels]
        )
    if fault == "nobody":
        noise = np.random.default_rng(0).integers(0, 255, (SIZE // 8, SIZE // 8, 3))
        wide = np.kron(noise, np.ones((8, 8, 1))).astype(np.uint8)
        return np.stack([np.roll(wide, number, axis=1) for number in range(len(pixels))])
    return pixels


def write_film(path, faults, seed=0, people=None):
    """Write one clip per fault after another, and return their pairs."""
    pairs = list(itertools.islice(drawn_clips(seed, people), len(faults)))
    shots = [faulty(pair, fault) for pair, fault in zip(pairs, faults, strict=True)]
    write_video(path, np.concatenate(shots), FPS, FINE)
    return pairs
