"""What rewards share: reference photos, known faces, terms, and the frames that are scored."""

from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float
from PIL import Image

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_reference
from jax_idgrpo.sampling import conditioning

Terms = dict[str, Float[Array, "B"]]


@struct.dataclass
class References:
    """Reference photos of the people asked for, in [-1, 1]; mask is False on padding.

    photos: each row's photos as they are stored, without padding, for rewards that look at them in their own size; empty where the
    images are all there is.
    """

    images: Float[Array, "B M h w 3"]
    mask: Bool[Array, "B M"]
    photos: tuple[tuple[Image.Image, ...], ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class Known:
    """What is known of the people asked for, from their photos: unit embeddings of their faces, and crops of them (see `photo_copy`); zero
    on padding."""

    embeddings: Float[Array, "B M E"]
    crops: Float[Array, "B M S S 3"]


def frame_numbers(frames: int, wanted: int) -> np.ndarray:
    """`wanted` evenly spaced frame numbers of `frames`, first and last among them; all of them for 0."""
    if wanted == 0 or wanted >= frames:
        return np.arange(frames)
    return np.round(np.linspace(0, frames - 1, wanted)).astype(int)


def references(prompts: Sequence[Prompt], config: Config) -> References:
    """The reference photos of each prompt at the size of the video, white padding behind them, and as they are stored."""
    size, people = (config.video.height, config.video.width), config.data.max_people
    images, mask = np.ones((len(prompts), people, *size, 3), np.float32), np.zeros((len(prompts), people), bool)
    photos = tuple(tuple(load_reference(path) for path in prompt.references) for prompt in prompts)
    for n, row in enumerate(photos):
        for m, photo in enumerate(row):
            images[n, m], mask[n, m] = conditioning.canvas(photo, *size), True
    return References(images=images, mask=mask, photos=photos)
