"""Track faces through a video, and compute penalties on identity and framing.

A face of a frame joins the track whose last face it overlaps and resembles. The assignment is exact
and maximises 2 intersection over union + cosine: position must outweigh resemblance, or an exchange
of identities would go unnoticed. Other faces begin tracks. References are then assigned to tracks
once for the whole video, so that the total similarity is maximal. A frame whose own assignment
differs shows an exchange. Shapes are static: K faces per frame, 2 K tracks. No gradient flows
through.

Every penalty is 0 for a perfect video and at most 1. It is a share of frames, people or similarity.
The definitions are ours.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo.rewards.matching import Matches, cosines, masked_mean, match, most_alike


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Thresholds; similarities are cosines in [-1, 1], areas are shares of the frame.

    Attributes:
      link: 2 overlap + cosine below which a face begins a new track.
      duplicate: cosine of two faces of one frame above which they count as one person.
      blend: margin by which a face may resemble another reference more than its own reference does.
      area_low: area of a face below which it is too small.
      area_high: area of a face above which it is too large.
    """

    link: float = 0.5
    duplicate: float = 0.5
    blend: float = 0.15
    area_low: float = 0.005
    area_high: float = 0.35


@flax.struct.dataclass
class Tracks:
    """Tracks of faces and references.

    Attributes:
      track: track of every face, 2 K for no face.
      of_reference: track of every reference, 2 K for none.
    """

    track: Int[Array, "B T K"]
    of_reference: Int[Array, "B M"]


def overlap(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Compute the intersection over union of boxes x0 y0 x1 y1; leading axes are broadcast."""
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    shared = jnp.prod(jnp.maximum(high - low, 0), -1)
    areas = [jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0), -1) for box in (a, b)]
    return shared / jnp.maximum(areas[0] + areas[1] - shared, 1e-6)


def link(
    boxes: Float[Array, "B T K 4"],
    embeddings: Float[Array, "B T K E"],
    face_mask: Bool[Array, "B T K"],
    least: float,
) -> Int[Array, "B T K"]:
    """Link the faces of frames to tracks.

    A track without a face in a frame stays open, and ends when a new track needs its slot.

    Args:
      boxes: x0 y0 x1 y1 in pixels.
      embeddings: unit vectors.
      face_mask: False on padding.
      least: 2 overlap + cosine below which a face begins a new track.

    Returns:
      The track of every face, 2 K on padding.
    """
    batch, _, faces = face_mask.shape
    count = 2 * faces

    def follow(
        state: tuple[Array, Array, Array], frame: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], Int[Array, "B K"]]:
        last_box, last_embedding, begun = state
        box, embedding, seen = frame
        alike = jnp.einsum("bne,bke->bnk", last_embedding, embedding, precision="highest")
        near = overlap(last_box[:, :, None], box[:, None])
        face = match(alike + 2 * near, begun, seen, least)  # index of the face of each track
        joined = jax.nn.one_hot(face, faces, dtype=bool, axis=-1)  # [B, tracks, faces]
        new = seen & ~jnp.any(joined, axis=1)
        taken = jnp.any(joined, axis=-1)
        free = jnp.argsort(2 * taken + begun, axis=-1)  # unused slots, then open ones
        slot = jnp.take_along_axis(free, jnp.maximum(jnp.cumsum(new, -1) - 1, 0), axis=-1)
        joined |= (jax.nn.one_hot(slot, count, dtype=bool) & new[..., None]).swapaxes(1, 2)
        has = jnp.any(joined, axis=-1)
        which = jnp.argmax(joined, axis=-1)[..., None]
        last_box = jnp.where(has[..., None], jnp.take_along_axis(box, which, axis=1), last_box)
        last_embedding = jnp.where(
            has[..., None], jnp.take_along_axis(embedding, which, axis=1), last_embedding
        )
        track = jnp.where(seen, jnp.argmax(joined, axis=1), count)
        return (last_box, last_embedding, begun | has), track

    start = (
        jnp.zeros((batch, count, 4)),
        jnp.zeros((batch, count, embeddings.shape[-1])),
        jnp.zeros((batch, count), bool),
    )
    frames = tuple(jnp.moveaxis(leaf, 1, 0) for leaf in (boxes, embeddings, face_mask))
    return jnp.moveaxis(jax.lax.scan(follow, start, frames)[1], 0, 1)


def tracks(
    boxes: Float[Array, "B T K 4"],
    embeddings: Float[Array, "B T K E"],
    face_mask: Bool[Array, "B T K"],
    references: Float[Array, "B M E"],
    reference_mask: Bool[Array, "B M"],
    null_similarity: float,
    config: TrackConfig,
) -> Tracks:
    """Link faces to tracks, and assign references to tracks.

    The assignment maximises the similarity summed over frames. A reference without a track counts
    `null_similarity` per frame.

    Args:
      boxes: x0 y0 x1 y1 in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      reference_mask: False on padding.
      null_similarity: minimum cosine for a match.
      config: thresholds.
    """
    frames, faces = face_mask.shape[1:]
    found = link(boxes, embeddings, face_mask, config.link)
    alike = (
        jnp.einsum("btke,bme->btkm", embeddings, references, precision="highest") - null_similarity
    )
    of_track = jax.nn.one_hot(found, 2 * faces)
    total = (
        jnp.einsum(
            "btkn,btkm->bmn",
            of_track,
            jnp.where(face_mask[..., None], alike, 0.0),
            precision="highest",
        )
        / frames
    )
    return Tracks(
        track=found,
        of_reference=match(total, reference_mask, jnp.any(of_track > 0, axis=(1, 2)), 0.0),
    )


def penalties(
    boxes: Float[Array, "B T K 4"],
    embeddings: Float[Array, "B T K E"],
    face_mask: Bool[Array, "B T K"],
    references: Float[Array, "B M E"],
    reference_mask: Bool[Array, "B M"],
    matches: Matches,
    size: tuple[int, int],
    null_similarity: float,
    config: TrackConfig,
) -> dict[str, Float[Array, " B"]]:
    """Compute penalties on identity and framing, each [B] in [0, 1].

      missing: share of people and frames without the person.
      duplicated: excess cosine over `duplicate` of the most alike two faces, mean over frames.
      swapped: share of matched people and frames whose face is on the track of another reference.
      switched: share of steps in which a reference's track changes.
      blended: excess resemblance of matched faces to another reference, beyond `blend`.
      area: relative distance of the area of matched faces from its allowed range.

    Args:
      boxes: x0 y0 x1 y1 in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      reference_mask: False on padding.
      matches: references matched to the faces.
      size: height and width of the frames in pixels.
      null_similarity: minimum cosine for a match.
      config: thresholds.
    """
    frames, faces = face_mask.shape[1:]
    found = tracks(
        boxes, embeddings, face_mask, references, reference_mask, null_similarity, config
    )
    matched = matches.matched & reference_mask[:, None]
    count = jnp.maximum(jnp.sum(matched, (1, 2)), 1)

    most = most_alike(embeddings, face_mask)
    duplicated = jnp.mean(jax.nn.relu(most - config.duplicate), axis=1) / (1 - config.duplicate)

    padded = jnp.pad(found.track, ((0, 0), (0, 0), (0, 1)), constant_values=2 * faces)
    # [B,T,M] the track of the matched face
    here = jnp.take_along_axis(padded, matches.face, axis=-1)
    others = jnp.where(reference_mask, found.of_reference, -1)
    foreign = jnp.any(here[..., None] == others[:, None, None, :], axis=-1) & (
        here != found.of_reference[:, None]
    )
    swapped = jnp.sum(foreign & matched, (1, 2)) / count
    changes = (here[:, 1:] != here[:, :-1]) & matched[:, 1:] & matched[:, :-1]
    switched = masked_mean(jnp.sum(changes, 1) / max(frames - 1, 1), reference_mask)

    similar = cosines(embeddings, references)
    # [B,T,j,i]: cosine of the face matched to i with reference j
    of_face = jnp.take_along_axis(
        jnp.pad(similar, ((0, 0), (0, 0), (0, 0), (0, 1))), matches.face[:, :, None], axis=-1
    )
    mutual = jnp.einsum("bme,bne->bmn", references, references, precision="highest")
    beyond = jnp.where(
        (reference_mask[:, :, None] & ~jnp.eye(references.shape[1], dtype=bool))[:, None],
        of_face - mutual[:, None],
        -jnp.inf,
    )
    excess = jax.nn.relu(jnp.max(beyond, axis=2, initial=-1.0) - config.blend)
    blended = jnp.sum(jnp.where(matched, jnp.minimum(excess, 1.0), 0.0), (1, 2)) / count

    share = jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), -1) / (size[0] * size[1])
    share = jnp.take_along_axis(jnp.pad(share, ((0, 0), (0, 0), (0, 1))), matches.face, axis=-1)
    small = jnp.clip(1 - share / config.area_low, 0, 1)
    large = jnp.clip((share - config.area_high) / (1 - config.area_high), 0, 1)
    area = jnp.sum(jnp.where(matched, small + large, 0.0), (1, 2)) / count

    missing = 1 - masked_mean(jnp.mean(matched, 1), reference_mask)
    named = dict(
        missing=missing,
        duplicated=duplicated,
        swapped=swapped,
        switched=switched,
        blended=blended,
        area=area,
    )
    return {name: value.astype(jnp.float32) for name, value in named.items()}
