"""Who is who in a video, and how alike: exact matching of references to faces, identity terms, evaluation metrics.

Everything here takes boxes, embeddings and masks, so it is pure, static in shape and needs no weights.
Per frame the best partial one-to-one map from references to faces is found by dynamic programming over sets of faces (exact,
and of fixed size); a reference may also stay unmatched, which is worth `null_similarity`. Then

    c_i  = (1/T) sum_t m_ti g(s_ti),   g(s) = clip((s - low) / (high - low), 0, 1),   a missing person counts 0
    mean = avg_i c_i                   soft = -(1/b) log(avg_i exp(-b c_i))           between the minimum and the mean
    reward = w mean + (1 - w) soft - extra_weight extra - motion_weight stillness - sum of weighted penalties (see `tracks`, `photo_copy`)

Gradients reach the embeddings through the similarities s, not through the assignment. Sources: optimal assignment as in UMO
(bytedance/UMO), missing = 0 as in MultiHuman-TestBench; the soft minimum and the penalties are ours.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jax_idgrpo.rewards import photo_copy
from jax_idgrpo.rewards.matching import (
    Matches,
    cosines,
    masked_mean,
    match,
    match_videos,
    most_alike,
)
from jax_idgrpo.rewards.tracks import TrackConfig, penalties


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Constants of the identity reward; similarities are cosines in [-1, 1].

    null_similarity: a face below it is not the person, however lonely both are.
    low, high: similarity that earns 0, and that earns 1 (two photos of one person: a copy earns no more).
    softness: b of the soft minimum. mean_weight: w. extra_weight: price of faces nobody asked for.
    motion_weight, motion_floor: price of a frozen video, whose mean absolute frame difference lies below the floor.
    penalties: prices by name of the penalties of `tracks` and of "copied"; those without one are logged alone. tracks: their thresholds.
    """

    null_similarity: float = 0.15
    low: float = 0.15
    high: float = 0.8
    softness: float = 10.0
    mean_weight: float = 0.5
    extra_weight: float = 0.1
    motion_weight: float = 0.2
    motion_floor: float = 0.005
    penalties: tuple[tuple[str, float], ...] = ()
    tracks: TrackConfig = dataclasses.field(default_factory=TrackConfig)


def level(similarity: Float[ArrayLike, "*n"], low: float, high: float) -> Float[ArrayLike, "*n"]:
    """g(s): the similarity mapped from [low, high] to [0, 1]."""
    return jnp.clip((similarity - low) / (high - low), 0.0, 1.0)


def person_scores(matches: Matches, low: float, high: float) -> Float[ArrayLike, "B M"]:
    """c_i: mean over frames of the similarity mapped from [low, high] to [0, 1]; a missing person counts 0."""
    return jnp.mean(jnp.where(matches.matched, level(matches.similarity, low, high), 0.0), axis=1)


def soft_minimum(
    values: Float[ArrayLike, "B M"], mask: Bool[ArrayLike, "B M"], softness: float
) -> Float[ArrayLike, " B"]:
    """-(1/b) log(avg exp(-b c)) over the people asked for: between their minimum and their mean."""
    exponents = jnp.where(mask, -softness * values, -jnp.inf)
    count = jnp.maximum(jnp.sum(mask, -1), 1)
    return -(jax.nn.logsumexp(exponents, axis=-1) - jnp.log(count)) / softness


def extra_faces(
    face_mask: Bool[ArrayLike, "B T K"], reference_mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Faces beyond the people asked for, as a share of them, at most 1, mean over frames."""
    asked = jnp.maximum(jnp.sum(reference_mask, -1), 1)[:, None]
    surplus = jnp.maximum(jnp.sum(face_mask, -1) - asked, 0)
    return jnp.mean(jnp.minimum(surplus / asked, 1.0), axis=1)


def count_accuracy(
    face_mask: Bool[ArrayLike, "B T K"], reference_mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Share of frames that show as many faces as people were asked for."""
    return jnp.mean(jnp.sum(face_mask, -1) == jnp.sum(reference_mask, -1)[:, None], axis=1)


def largest_face_similarity(
    boxes: Float[ArrayLike, "B T K 4"],
    embeddings: Float[ArrayLike, "B T K E"],
    face_mask: Bool[ArrayLike, "B T K"],
    references: Float[ArrayLike, "B M E"],
    reference_mask: Bool[ArrayLike, "B M"],
) -> Float[ArrayLike, " B"]:
    """How papers with one person measure: the largest face of a frame against the reference it is most like, at least 0, mean over the
    frames that show a face; 0 without any.

    It sees one person of several, and a frame without a face costs nothing: read it beside `similarity`, which counts everybody.
    Source: FaceSim of OpenS2V (PKU-YuanGroup/OpenS2V-Nexus).
    """
    area = jnp.where(
        face_mask, (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]), -1.0
    )
    largest = jnp.take_along_axis(embeddings, jnp.argmax(area, -1)[..., None, None], axis=2)[
        :, :, 0
    ]
    cosine = jnp.where(
        reference_mask[:, None],
        jnp.einsum("bte,bme->btm", largest, references, precision="highest"),
        -1.0,
    )
    shown = jnp.any(face_mask, -1)
    return jnp.sum(jnp.where(shown, jnp.maximum(jnp.max(cosine, -1), 0.0), 0.0), 1) / jnp.maximum(
        jnp.sum(shown, 1), 1
    )


@flax.struct.dataclass
class Pixels:
    """What the terms need of the pixels, frame by frame.

    changed: absolute difference from the frame before, mean over colours, summed outside the faces
        of both; 0 for the first frame.
    outside: how many pixels that sum has.
    copied, apart, detail: of the face that every person is matched to (see `photo_copy`).
    """

    changed: Float[ArrayLike, "B T"]
    outside: Float[ArrayLike, "B T"]
    copied: Float[ArrayLike, "B T M"]
    apart: Float[ArrayLike, "B T M"]
    detail: Float[ArrayLike, "B T M"]


def _in_faces(
    boxes: Float[ArrayLike, "B K 4"], face_mask: Bool[ArrayLike, "B K"], height: int, width: int
) -> Bool[ArrayLike, "B H W"]:
    """True inside the faces of a frame."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_x = (columns >= boxes[..., 0:1]) & (columns <= boxes[..., 2:3])
    inside_y = (rows >= boxes[..., 1:2]) & (rows <= boxes[..., 3:4]) & face_mask[..., None]
    sides = inside_y.astype(jnp.float32), inside_x.astype(jnp.float32)
    return jnp.einsum("bkh,bkw->bhw", *sides) > 0


def changes(
    videos: Float[ArrayLike, "B T H W 3"],
    boxes: Float[ArrayLike, "B T K 4"],
    face_mask: Bool[ArrayLike, "B T K"],
) -> tuple[Float[ArrayLike, "B T"], Float[ArrayLike, "B T"]]:
    """Compute `changed` and `outside` of `Pixels`, one frame after the other."""
    height, width = videos.shape[2:4]

    def one(frame: Int[Array, ""]) -> tuple[Array, Array]:
        def taken(number: Int[Array, ""]) -> tuple[Array, Array]:
            picture, box, mask = (
                jax.lax.dynamic_index_in_dim(leaf, number, 1, keepdims=False)
                for leaf in (videos, boxes, face_mask)
            )
            return picture, _in_faces(box, mask, height, width)

        (now, covered), (before, covered_before) = taken(frame), taken(jnp.maximum(frame - 1, 0))
        shown = ~(covered | covered_before) & (frame > 0)
        moved = jnp.mean(jnp.abs(now - before), -1)
        count = jnp.sum(shown, (1, 2), dtype=jnp.float32)
        return jnp.sum(jnp.where(shown, moved, 0.0), (1, 2)), count

    changed, outside = jax.lax.map(one, jnp.arange(videos.shape[1]))
    return changed.T, outside.T


def motion(
    changed: Float[ArrayLike, "B T"], outside: Float[ArrayLike, "B T"]
) -> Float[ArrayLike, " B"]:
    """Mean absolute difference of neighbouring frames outside the faces of both.

    In units of [-1, 1]; 0 for one frame. changed, outside: as `changes` computes them.
    """
    return jnp.sum(changed, 1) / jnp.maximum(jnp.sum(outside, 1), 1.0)


def stalled(
    changed: Float[ArrayLike, "B T"], outside: Float[ArrayLike, "B T"], floor: float
) -> Float[ArrayLike, " B"]:
    """Share of the steps from frame to frame in which nothing moves, in [0, 1]; 0 for one frame.

    A step counts by how far its `motion` is below the floor, as a share of the floor. A video that
    comes to a standstill late has a `motion` like another's, but not this.

    Args:
      changed: as `changes` computes it.
      outside: as `changes` computes it.
      floor: motion from which on a step counts nothing.
    """
    moved = changed[:, 1:] / jnp.maximum(outside[:, 1:], 1.0)
    return jnp.sum(jax.nn.relu(1.0 - moved / floor), 1) / max(moved.shape[1], 1)


def read_pixels(
    videos: Float[ArrayLike, "B T H W 3"],
    boxes: Float[ArrayLike, "B T K 4"],
    landmarks: Float[ArrayLike, "B T K 5 2"],
    face_mask: Bool[ArrayLike, "B T K"],
    matches: Matches,
    photos: Float[ArrayLike, "B M S S 3"],
) -> Pixels:
    """Measure the frames of videos, one after the other.

    Args:
      videos: values in [-1, 1].
      boxes: of the faces, in pixels.
      landmarks: of the faces, in pixels.
      face_mask: False on padding.
      matches: references matched to the faces.
      photos: `photo_copy.photo_crops` of the references.
    """
    padded = jnp.pad(landmarks, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    theirs = jnp.take_along_axis(padded, matches.face[..., None, None], axis=2)

    def one(frame: Int[Array, ""]) -> tuple[Array, Array, Array]:
        picture = jax.lax.dynamic_slice_in_dim(videos, frame, 1, 1)
        places = jax.lax.dynamic_slice_in_dim(theirs, frame, 1, 1)
        copied, moved = photo_copy.copies(picture, places, photos)
        sharp = photo_copy.detail(picture, places, photos)
        return copied[:, 0], moved[:, 0], sharp[:, 0]

    measured = jax.lax.map(one, jnp.arange(videos.shape[1]))
    copied, apart, detail = (jnp.moveaxis(leaf, 0, 1) for leaf in measured)
    changed, outside = changes(videos, boxes, face_mask)
    return Pixels(changed=changed, outside=outside, copied=copied, apart=apart, detail=detail)


def of_photos(
    pixels: Pixels, matches: Matches, reference_mask: Bool[ArrayLike, "B M"]
) -> dict[str, Float[ArrayLike, " B"]]:
    """What the matched faces have of the person's photo (see `photo_copy`); 0 without any.

    Each is the mean over the matched faces.
    copied: share of them that are a copy of the photo, in [0, 1].
    apart: how far eyes, nose and mouth are from where they are in the photo, as a share of the face.
    detail: how sharp they are, 1 as the photo, 0 without any detail.
    """
    matched = matches.matched & reference_mask[:, None]
    count = jnp.maximum(jnp.sum(matched, (1, 2)), 1)
    measured = {"copied": pixels.copied, "apart": pixels.apart, "detail": pixels.detail}
    return {
        name: jnp.sum(jnp.where(matched, values, 0.0), (1, 2)) / count
        for name, values in measured.items()
    }


def reward_terms(
    videos: Float[ArrayLike, "B T H W 3"],
    boxes: Float[ArrayLike, "B T K 4"],
    landmarks: Float[ArrayLike, "B T K 5 2"],
    embeddings: Float[ArrayLike, "B T K E"],
    face_mask: Bool[ArrayLike, "B T K"],
    references: Float[ArrayLike, "B M E"],
    photos: Float[ArrayLike, "B M S S 3"],
    reference_mask: Bool[ArrayLike, "B M"],
    config: IdentityConfig,
) -> dict[str, Float[ArrayLike, " B"]]:
    """Every term of the reward and the metrics that share its matching, each [B] in fp32.

    The terms are listed at `terms_of_faces`. photos: `photo_copy.photo_crops` of the references.
    """
    faces = (embeddings, face_mask, references, reference_mask)
    matches = match_videos(*faces, config.null_similarity)
    pixels = read_pixels(videos, boxes, landmarks, face_mask, matches, photos)
    height, width = videos.shape[2:4]
    return terms_of_faces(pixels, matches, boxes, *faces, (height, width), config)


def terms_of_faces(
    pixels: Pixels,
    matches: Matches,
    boxes: Float[ArrayLike, "B T K 4"],
    embeddings: Float[ArrayLike, "B T K E"],
    face_mask: Bool[ArrayLike, "B T K"],
    references: Float[ArrayLike, "B M E"],
    reference_mask: Bool[ArrayLike, "B M"],
    size: tuple[int, int],
    config: IdentityConfig,
) -> dict[str, Float[ArrayLike, " B"]]:
    """Compute the terms from what `read_pixels` measured and from the faces, each [B] in fp32.

    size: height and width of the frames.

    reward: what training maximises. identity_mean, identity_soft_min, extra, motion: its terms. costs: all that is subtracted.
    similarity, similarity_min: raw cosine of the matched faces, missing = 0, mean over frames, mean (or min) over people.
    faces_found: people matched, mean over frames. faces_seen: faces detected, mean over frames. faces_asked: people asked for.
    faces_share: faces detected, whosever they are, per person asked for, at most 1, mean over frames.
    count_accuracy, largest_face: see the functions of these names. mimr, id_conf, unique_faces: see
        multi_identity_matching, identity_confidence, unique_faces.
    missing, duplicated, swapped, switched, blended, area: see `tracks.penalties`. stalled: see the function.
    copied, apart, detail: see `of_photos`.
    """
    faces = (embeddings, face_mask, references, reference_mask)
    cosine = cosines(embeddings, references)
    people = person_scores(matches, config.low, config.high)
    identity_mean = masked_mean(people, reference_mask)
    identity_soft_min = soft_minimum(people, reference_mask, config.softness)
    extra = extra_faces(face_mask, reference_mask)
    moved = motion(pixels.changed, pixels.outside)
    stillness = jax.nn.relu(1.0 - moved / config.motion_floor)
    identity = config.mean_weight * identity_mean + (1.0 - config.mean_weight) * identity_soft_min
    prices = penalties(boxes, *faces, matches, size, config.null_similarity, config.tracks)
    compared = of_photos(pixels, matches, reference_mask)
    prices["copied"] = compared.pop("copied")
    costs = config.extra_weight * extra + config.motion_weight * stillness
    costs = costs + sum(weight * prices[name] for name, weight in config.penalties)
    raw = jnp.mean(matches.similarity, axis=1)
    asked = jnp.sum(reference_mask, -1)
    terms = {
        "reward": identity - costs,
        "costs": costs,
        "identity_mean": identity_mean,
        "identity_soft_min": identity_soft_min,
        "extra": extra,
        "motion": moved,
        "stalled": stalled(pixels.changed, pixels.outside, config.motion_floor),
        "similarity": masked_mean(raw, reference_mask),
        "similarity_min": jnp.min(jnp.where(reference_mask, raw, jnp.inf), -1),
        "faces_found": jnp.mean(jnp.sum(matches.matched, -1), -1),
        "faces_seen": jnp.mean(jnp.sum(face_mask, -1), -1),
        "faces_share": jnp.mean(
            jnp.minimum(jnp.sum(face_mask, -1) / jnp.maximum(asked, 1)[:, None], 1.0), axis=1
        ),
        "faces_asked": asked,
        "count_accuracy": count_accuracy(face_mask, reference_mask),
        "largest_face": largest_face_similarity(boxes, *faces),
        "mimr": multi_identity_matching(cosine, face_mask, reference_mask),
        "id_conf": identity_confidence(cosine, face_mask, reference_mask),
        "unique_faces": unique_faces(embeddings, face_mask),
        **compared,
        **prices,
    }
    return {name: value.astype(jnp.float32) for name, value in terms.items()}


def term_names(config: IdentityConfig) -> tuple[str, ...]:
    """Names of what `reward_terms` says, from shapes alone."""

    def zeros(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    one, people = jax.ShapeDtypeStruct((1, 2, 1), jnp.bool), jax.ShapeDtypeStruct((1, 1), jnp.bool)
    seen = zeros(1, 2, 8, 8, 3), zeros(1, 2, 1, 4), zeros(1, 2, 1, 5, 2), zeros(1, 2, 1, 4), one
    known = zeros(1, 1, 4), zeros(1, 1, photo_copy.SIDE, photo_copy.SIDE, 3), people
    return tuple(jax.eval_shape(functools.partial(reward_terms, config=config), *seen, *known))


ALWAYS = -50.0  # worth of a reference without a face: far less than any exchange of cosines among a dozen people can win


def multi_identity_matching(
    cosine: Float[Array, "B T M K"],
    face_mask: Bool[Array, "B T K"],
    reference_mask: Bool[Array, "B M"],
) -> Float[Array, "B"]:
    """MIMR: the mean over all pairs of reference and face of their cosine, counted +1 for the pairs of the best assignment and -1 for
    the others; 0 for a frame without a face. In [-1, 1].

    As many pairs are assigned as there can be, however unlike. It pushes identities apart; a missing person enters through the mean alone.
    Source: UMO, arXiv 2509.06818 (bytedance/UMO).
    """
    people = jnp.broadcast_to(reference_mask[:, None], cosine.shape[:-1])
    face = match(cosine, people, face_mask, ALWAYS)
    sign = jnp.where(face[..., None] == jnp.arange(cosine.shape[-1]), 1.0, -1.0)
    pair = people[..., None] & face_mask[..., None, :]
    total = jnp.sum(jnp.where(pair, sign * cosine, 0.0), (2, 3))
    return jnp.mean(total / jnp.maximum(jnp.sum(pair, (2, 3)), 1), axis=1)


def identity_confidence(
    cosine: Float[Array, "B T M K"],
    face_mask: Bool[Array, "B T K"],
    reference_mask: Bool[Array, "B M"],
) -> Float[Array, "B"]:
    """ID-Conf: clip(1 - second / first, 0, 1) of the two largest cosines of a reference to the faces of a frame, mean over people.

    With one face the second is 0; where the first is not positive nobody is found, and the confidence is 0. Source: UMO, arXiv 2509.06818.
    """
    cosine = jnp.where(face_mask[:, :, None], cosine, 0.0)
    ranked = jnp.sort(jnp.pad(cosine, ((0, 0), (0, 0), (0, 0), (0, 2))), axis=-1)
    first, second = ranked[..., -1], ranked[..., -2]
    found = first > 0
    confidence = jnp.where(
        found, jnp.clip(1 - second / jnp.where(found, first, 1.0), 0.0, 1.0), 0.0
    )
    return masked_mean(jnp.mean(confidence, axis=1), reference_mask)


def unique_faces(
    embeddings: Float[Array, "B T K E"], face_mask: Bool[Array, "B T K"]
) -> Float[Array, "B"]:
    """1 - the greatest cosine of two faces of a frame, 0.5 for a frame with fewer than two. In [0, 2]; no reference is looked at.

    Source: the term within one image of DisCo, arXiv 2510.01399; its terms across images are about diversity, which references forbid.
    """
    several = jnp.sum(face_mask, -1) > 1
    return jnp.mean(jnp.where(several, 1 - most_alike(embeddings, face_mask), 0.5), axis=1)
