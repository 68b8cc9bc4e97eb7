"""Compare whole people with their photos: hair, clothes and build, beside the face.

The region of a person follows from the box x0 y0 x1 y1 of the face, of width w and height h:

    x0 - 1.0 w .. x1 + 1.0 w,   y0 - 0.6 h .. y1 + 4.0 h,   within the picture

Where the regions of two faces of a picture overlap, both end halfway between the centres of the
faces, though never inside their own face. The photo has a region by the same rule, of its largest
face. What the photo does not show is not compared: the region in a video reaches no further beyond
the face, in units of w and h, than the photo's region does on the same side. A person whose photo
shows less than 1.2 h does not count.

A network f (`models.dino`) describes regions, which are resized to its square input. A person
belongs to the track of faces that `tracks` assigns to them, so that

    s_i               = (1/T) sum_t cos(f(region of i in frame t), f(region of i in the photo))
    person_similarity = mean of s_i over the people who count

A frame without a face on the track of the person counts 0. Gradients reach the pixels of the
regions, not the boxes.

Source: PSR (arXiv 2512.01236), which crops with a text-conditioned detector and scores the whole
picture if it finds nobody; the regions are ours.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from PIL import Image

from checkpoints_convert.faces import FACES
from jax_idgrpo.models.dino import Dino
from jax_idgrpo.rewards.faces import normalise
from jax_idgrpo.rewards.matching import masked_mean
from jax_idgrpo.rewards.tracks import TrackConfig, tracks

# How far a region reaches beyond the face: left, up, right, down, in widths and heights of the face.
REACH = (1.0, 0.6, 1.0, 4.0)
LEAST = 1.2  # smallest height of a photo's region, in heights of the face


@flax.struct.dataclass
class ReferencePeople:
    """The people of P prompts' reference photos, zero on padding.

    Attributes:
      features: unit vectors of the photos' regions.
      reach: how far the photos' regions reach beyond the face: left, up, right, down, in widths and
        heights of the face.
      counts: False on padding, and for a person of whom the photo shows too little.
    """

    features: Float[Array, "P M D"]
    reach: Float[Array, "P M 4"]
    counts: Bool[Array, "P M"]


def _steps(boxes: Float[ArrayLike, "*n 4"]) -> Float[Array, "*n 4"]:
    """Return the width and height of boxes, twice, with a sign that points out of the box."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return jnp.concatenate([-sides, sides], -1)


def _common(a: Float[ArrayLike, "... 4"], b: Float[ArrayLike, "... 4"]) -> Float[Array, "... 4"]:
    """Return the intersection of boxes; leading axes are broadcast."""
    return jnp.concatenate(
        [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1
    )


def regions(
    boxes: Float[ArrayLike, "*n K 4"],
    mask: Bool[ArrayLike, "*n K"],
    size: Float[ArrayLike, "2"],
) -> Float[Array, "*n K 4"]:
    """Compute the region of the person of each face of a picture.

    Args:
      boxes: x0 y0 x1 y1 of the faces; integers are pixel centres.
      mask: False on padding.
      size: height and width of the picture in pixels.

    Returns:
      x0 y0 x1 y1 of the regions; without extent for a face outside the picture.
    """
    height, width = size[0], size[1]
    picture = jnp.stack([jnp.zeros_like(width), jnp.zeros_like(height), width, height]) - 0.5
    whole = _common(boxes + jnp.asarray(REACH) * _steps(boxes), picture)
    shared = _common(whole[..., :, None, :], whole[..., None, :, :])
    overlap = jnp.all(shared[..., 2:] > shared[..., :2], -1)
    centre = (boxes[..., 0] + boxes[..., 2]) / 2
    middle = (centre[..., :, None] + centre[..., None, :]) / 2
    others = overlap & mask[..., None, :] & ~jnp.eye(boxes.shape[-2], dtype=bool)
    on_left = others & (centre[..., None, :] < centre[..., :, None])
    on_right = others & (centre[..., None, :] > centre[..., :, None])
    left = jnp.max(jnp.where(on_left, middle, -jnp.inf), -1)
    right = jnp.min(jnp.where(on_right, middle, jnp.inf), -1)
    x0 = jnp.maximum(whole[..., 0], jnp.minimum(left, boxes[..., 0]))
    x1 = jnp.minimum(whole[..., 2], jnp.maximum(right, boxes[..., 2]))
    return jnp.stack([x0, whole[..., 1], x1, whole[..., 3]], -1)


def reach_of(
    region: Float[ArrayLike, "*n 4"], boxes: Float[ArrayLike, "*n 4"]
) -> Float[Array, "*n 4"]:
    """Compute how far regions reach beyond the faces: left, up, right, down, in widths and heights."""
    return (region - boxes) / _steps(boxes)


def cut(
    region: Float[ArrayLike, "... 4"],
    boxes: Float[ArrayLike, "... 4"],
    reach: Float[ArrayLike, "... 4"],
) -> Float[Array, "... 4"]:
    """Cut regions to what photos show; leading axes are broadcast.

    Args:
      region: x0 y0 x1 y1 of regions.
      boxes: x0 y0 x1 y1 of their faces.
      reach: how far the photos' regions reach beyond the face, as `reach_of` returns it.
    """
    return _common(region, boxes + reach * _steps(boxes))


@jax.jit
def _of_photo(
    boxes: Float[Array, "K 4"], mask: Bool[Array, " K"], size: Float[Array, "2"]
) -> tuple[Float[Array, "4"], Float[Array, "4"], Float[Array, ""]]:
    """Return the region of the first face, its reach, and its height in heights of the face."""
    region = regions(boxes, mask, size)[0]
    reach = reach_of(region, boxes[0])
    return region, reach, (region[3] - region[1]) / (boxes[0, 3] - boxes[0, 1])


def photo_region(
    boxes: Float[np.ndarray, "N 4"], size: tuple[int, int]
) -> tuple[Float[np.ndarray, "4"], Float[np.ndarray, "4"]] | None:
    """Compute the region of the largest face of a photo, and how far it reaches beyond the face.

    Args:
      boxes: x0 y0 x1 y1 of the faces in pixels, largest first.
      size: height and width of the photo in pixels.

    Returns:
      The region, and left, up, right, down in widths and heights of the face; None if the photo
      shows too little of the person.
    """
    shown = boxes[:FACES].astype(np.float32)
    filled = np.pad(shown, ((0, FACES - len(shown)), (0, 0)))
    region, reach, height = jax.device_get(
        _of_photo(filled, np.arange(FACES) < len(shown), np.asarray(size, np.float32))
    )
    return (region, reach) if height >= LEAST else None


def photo_picture(
    image: Image.Image, region: Float[np.ndarray, "4"], side: int
) -> Float[np.ndarray, "S S 3"]:
    """Resize a region of a photo to a square, with smoothing, as `resized` does in a video.

    Args:
      image: the photo.
      region: x0 y0 x1 y1; integers are pixel centres.
      side: side of the square in pixels.
    """
    x0, y0, x1, y1 = (region.astype(float) + 0.5).tolist()
    box = max(x0, 0.0), max(y0, 0.0), min(x1, image.width), min(y1, image.height)
    small = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small).astype(np.float32) / np.float32(127.5) - 1


def resized(
    picture: Float[Array, "H W 3"], region: Float[Array, "4"], side: int
) -> Float[Array, "{side} {side} 3"]:
    """Resize a region of a picture to a square, with smoothing.

    Args:
      picture: values in [-1, 1].
      region: x0 y0 x1 y1, of one pixel or more; integers are pixel centres.
      side: side of the square in pixels.
    """
    scale = side / (region[2:] - region[:2])
    return jax.image.scale_and_translate(
        picture,
        (side, side, picture.shape[-1]),
        (1, 0),
        scale,
        -(region[:2] + 0.5) * scale,
        "linear",
        precision="highest",
    )


def describe(network: Dino, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B D"]:
    """Return unit vectors of resized regions with values in [-1, 1]."""
    return normalise(network(pictures))


def _features(
    network: Dino,
    videos: Float[Array, "B T H W 3"],
    places: Float[Array, "B T M 4"],
    shown: Bool[Array, "B T M"],
) -> Float[Array, "B T M D"]:
    """Describe regions, one person of one frame of all videos at a time; zero where none is shown.

    Args:
      network: describes the regions.
      videos: values in [-1, 1].
      places: x0 y0 x1 y1 of the regions.
      shown: whether a person has a region.
    """
    side, width = network.config.image_size, network.config.width
    resize = jax.vmap(lambda picture, region: resized(picture, region, side))

    def one(number: Int[Array, ""]) -> Float[Array, "B D"]:
        frame, person = number // shown.shape[2], number % shown.shape[2]
        pictures = jax.lax.dynamic_index_in_dim(videos, frame, 1, keepdims=False)
        region, here = places[:, frame, person], shown[:, frame, person]

        def found() -> Float[Array, "B D"]:
            return describe(network, resize(pictures, region)) * here[:, None]

        return jax.lax.cond(jnp.any(here), found, lambda: jnp.zeros((len(here), width)))

    rows = jax.lax.map(one, jnp.arange(shown.shape[1] * shown.shape[2]))
    return jnp.moveaxis(rows.reshape(*shown.shape[1:], len(shown), width), 2, 0)


def person_terms(
    network: Dino,
    videos: Float[Array, "B T H W 3"],
    boxes: Float[Array, "B T K 4"],
    embeddings: Float[Array, "B T K E"],
    face_mask: Bool[Array, "B T K"],
    references: Float[Array, "B M E"],
    reference_mask: Bool[Array, "B M"],
    people: ReferencePeople,
    null_similarity: float,
    config: TrackConfig,
) -> dict[str, Float[Array, " B"]]:
    """Compute `person_similarity` and `person_similarity_min`, in [-1, 1].

    Both are 0 for a video of which no person counts.

    Args:
      network: describes the regions.
      videos: values in [-1, 1].
      boxes: x0 y0 x1 y1 of the faces in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the reference faces.
      reference_mask: False on padding.
      people: regions of the reference photos.
      null_similarity: minimum cosine for a match.
      config: thresholds of the tracks.
    """
    faces = embeddings, face_mask, references, reference_mask
    found = tracks(boxes, *faces, null_similarity, config)
    own = found.track[:, :, None] == found.of_reference[:, None, :, None]  # [B, T, M, K]
    own &= face_mask[:, :, None]
    face = jnp.argmax(own, -1)[..., None]
    size = jnp.asarray(videos.shape[2:4], jnp.float32)
    box, whole = (
        jnp.take_along_axis(leaf, face, axis=2) for leaf in (boxes, regions(boxes, face_mask, size))
    )
    region = cut(whole, box, people.reach[:, None])
    counts = people.counts & reference_mask
    shown = jnp.any(own, -1) & counts[:, None]
    shown &= jnp.all(region[..., 2:] - region[..., :2] >= 1, -1)
    # The unit square stands for a missing region, whose size may be 0.
    region = jax.lax.stop_gradient(jnp.where(shown[..., None], region, jnp.array([0, 0, 1, 1.0])))
    features = _features(network, videos, region, shown)
    cosine = jnp.einsum("btmd,bmd->btm", features, people.features, precision="highest")
    similarity = jnp.mean(cosine, axis=1)
    smallest = jnp.min(jnp.where(counts, similarity, jnp.inf), -1)
    return {
        "person_similarity": masked_mean(similarity, counts),
        "person_similarity_min": jnp.where(jnp.any(counts, -1), smallest, 0.0),
    }
