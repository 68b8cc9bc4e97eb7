"""Match references to faces, and compute identity terms and evaluation metrics.

All functions take boxes, embeddings and masks. They are pure, static in shape and need no weights.
In each frame, the best partial one-to-one map from references to faces is found exactly, by dynamic
programming over sets of faces. A reference may also stay unmatched, with value `null_similarity`.
Then

    c_i  = (1/T) sum_t m_ti g(s_ti)
    g(s) = clip((s - low) / (high - low), 0, 1), and 0 for a missing person
    mean = avg_i c_i
    soft = -(1/b) log(avg_i exp(-b c_i)), between the minimum and the mean
    reward = w mean + (1 - w) soft - extra_weight extra - motion_weight stillness
             - sum of weighted penalties (see `tracks`, `photo_copy`, `matching.confusion`)

Gradients reach the embeddings through the similarities s, not through the assignment.

Sources: optimal assignment as in UMO (bytedance/UMO), missing = 0 as in MultiHuman-TestBench; the
soft minimum and the penalties are ours.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jax_idgrpo.rewards import photo_copy
from jax_idgrpo.rewards.distractors import recognition
from jax_idgrpo.rewards.matching import (
    Matches,
    confusion,
    cosines,
    masked_mean,
    match,
    match_videos,
    most_alike,
)
from jax_idgrpo.rewards.placed import PlaceTargets, placed
from jax_idgrpo.rewards.tracks import TrackConfig, penalties
from jax_idgrpo.rewards.turns import YawCalibration, head_turn, turn_terms


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """Constants of the identity reward; similarities are cosines in [-1, 1].

    Attributes:
      null_similarity: minimum cosine for a match; below it the reference stays unmatched even if no
        other face is left.
      low: similarity with score 0.
      high: similarity with score 1. Two photos of one person reach it, and a copy scores no higher.
      softness: b of the soft minimum.
      mean_weight: w, in [0, 1].
      extra_weight: penalty weight of surplus faces.
      motion_weight: penalty weight of a frozen video.
      motion_floor: mean absolute frame difference below which a video counts as frozen, in units of
        [-1, 1].
      penalties: weights by name of the penalties of `tracks`, of "copied" and of "confused";
        penalties without a weight are only logged.
      tracks: thresholds of the penalties.
      copies: what counts as a copy of the photo.
      yaw: constants of the yaw for the detector's landmarks; None leaves out the terms of `turns`.
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
    copies: photo_copy.Calibration = photo_copy.DRAWN
    yaw: YawCalibration | None = None


def level(similarity: Float[ArrayLike, "*n"], low: float, high: float) -> Float[ArrayLike, "*n"]:
    """Compute g(s): map the similarity from [low, high] to [0, 1].

    Args:
      similarity: cosines in [-1, 1].
      low: similarity mapped to 0.
      high: similarity mapped to 1.
    """
    return jnp.clip((similarity - low) / (high - low), 0.0, 1.0)


def person_scores(matches: Matches, low: float, high: float) -> Float[ArrayLike, "B M"]:
    """Compute c_i: the mean over frames of g(s); a missing person counts 0.

    Args:
      matches: references matched to the faces.
      low: similarity mapped to 0.
      high: similarity mapped to 1.
    """
    return jnp.mean(jnp.where(matches.matched, level(matches.similarity, low, high), 0.0), axis=1)


def soft_minimum(
    values: Float[ArrayLike, "B M"], mask: Bool[ArrayLike, "B M"], softness: float
) -> Float[ArrayLike, " B"]:
    """Compute -(1/b) log(avg exp(-b c)) over people, between minimum and mean.

    Args:
      values: c, one per person.
      mask: False on padding.
      softness: b, positive; larger is closer to the minimum.
    """
    exponents = jnp.where(mask, -softness * values, -jnp.inf)
    count = jnp.maximum(jnp.sum(mask, -1), 1)
    return -(jax.nn.logsumexp(exponents, axis=-1) - jnp.log(count)) / softness


def extra_faces(
    face_mask: Bool[ArrayLike, "B T K"], reference_mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Average the share of surplus faces over frames.

    The share is relative to the requested people, at most 1.
    """
    asked = jnp.maximum(jnp.sum(reference_mask, -1), 1)[:, None]
    surplus = jnp.maximum(jnp.sum(face_mask, -1) - asked, 0)
    return jnp.mean(jnp.minimum(surplus / asked, 1.0), axis=1)


def count_accuracy(
    face_mask: Bool[ArrayLike, "B T K"], reference_mask: Bool[ArrayLike, "B M"]
) -> Float[ArrayLike, " B"]:
    """Return the share of frames with as many faces as requested people."""
    return jnp.mean(jnp.sum(face_mask, -1) == jnp.sum(reference_mask, -1)[:, None], axis=1)


def largest_face_similarity(
    boxes: Float[ArrayLike, "B T K 4"],
    embeddings: Float[ArrayLike, "B T K E"],
    face_mask: Bool[ArrayLike, "B T K"],
    references: Float[ArrayLike, "B M E"],
    reference_mask: Bool[ArrayLike, "B M"],
) -> Float[ArrayLike, " B"]:
    """Compare the largest face of a frame with its most similar reference.

    This is the metric of papers with one person: the cosine, at least 0, averaged over frames that
    show a face; 0 without any. It covers one person of several, and frames without a face do not
    lower it. Report it beside `similarity`, which covers every person.

    Source: FaceSim of OpenS2V (PKU-YuanGroup/OpenS2V-Nexus).

    Args:
      boxes: x0 y0 x1 y1 in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      reference_mask: False on padding.
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
    """Measurements of the pixels that the terms need, frame by frame.

    Attributes:
      changed: absolute difference from the previous frame, averaged over colours and summed outside
        the faces of both; 0 for the first frame.
      outside: number of pixels in that sum.
      copied: photo-copy score of the face matched to every person (see `photo_copy`).
      apart: displacement of that face from the photo.
      detail: sharpness of that face relative to the photo.
      turn: turn of that head (see `turns.head_turn`).
    """

    changed: Float[ArrayLike, "B T"]
    outside: Float[ArrayLike, "B T"]
    copied: Float[ArrayLike, "B T M"]
    apart: Float[ArrayLike, "B T M"]
    detail: Float[ArrayLike, "B T M"]
    turn: Float[ArrayLike, "B T M"]


def _in_faces(
    boxes: Float[ArrayLike, "B K 4"], face_mask: Bool[ArrayLike, "B K"], height: int, width: int
) -> Bool[ArrayLike, "B H W"]:
    """Return a mask that is True inside the faces of a frame."""
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
    """Compute `changed` and `outside` of `Pixels`, one frame after the other.

    Args:
      videos: values in [-1, 1].
      boxes: x0 y0 x1 y1 in pixels.
      face_mask: False on padding.
    """
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
    """Compute the mean absolute difference of neighbouring frames outside the faces of both.

    Returns:
      The difference in units of [-1, 1]; 0 for one frame.
    """
    return jnp.sum(changed, 1) / jnp.maximum(jnp.sum(outside, 1), 1.0)


def stalled(
    changed: Float[ArrayLike, "B T"], outside: Float[ArrayLike, "B T"], floor: float
) -> Float[ArrayLike, " B"]:
    """Compute the share of frame-to-frame steps without motion, in [0, 1]; 0 for one frame.

    A step counts by its relative shortfall of `motion` below the floor. Unlike `motion`, this term
    detects a video that stops moving late.

    Args:
      changed: as `changes` computes it.
      outside: as `changes` computes it.
      floor: motion from which on a step does not count.
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
    calibration: photo_copy.Calibration,
) -> Pixels:
    """Measure the frames of videos, one after the other.

    Args:
      videos: values in [-1, 1].
      boxes: x0 y0 x1 y1 of the faces in pixels.
      landmarks: x, y of the faces' landmarks in pixels.
      face_mask: False on padding.
      matches: references matched to the faces.
      photos: `photo_copy.photo_crops` of the references.
      calibration: what counts as a copy of the photo.
    """
    padded = jnp.pad(landmarks, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    theirs = jnp.take_along_axis(padded, matches.face[..., None, None], axis=2)

    def one(frame: Int[Array, ""]) -> tuple[Array, Array, Array]:
        picture = jax.lax.dynamic_slice_in_dim(videos, frame, 1, 1)
        places = jax.lax.dynamic_slice_in_dim(theirs, frame, 1, 1)
        copied, moved = photo_copy.copies(picture, places, photos, calibration)
        sharp = photo_copy.detail(picture, places, photos, calibration.samples)
        return copied[:, 0], moved[:, 0], sharp[:, 0]

    measured = jax.lax.map(one, jnp.arange(videos.shape[1]))
    copied, apart, detail = (jnp.moveaxis(leaf, 0, 1) for leaf in measured)
    changed, outside = changes(videos, boxes, face_mask)
    return Pixels(changed, outside, copied, apart, detail, head_turn(theirs))


def of_photos(
    pixels: Pixels, matches: Matches, reference_mask: Bool[ArrayLike, "B M"]
) -> dict[str, Float[ArrayLike, " B"]]:
    """Compare the matched faces with the person's photo (see `photo_copy`).

    Each term is the mean over the matched faces, 0 without any.

      copied: share of faces that are a copy of the photo, in [0, 1].
      apart: displacement of eyes, nose and mouth from the photo, as a share of the face.
      detail: sharpness relative to the photo: 1 as the photo, 0 without any detail.

    Args:
      pixels: measurements of `read_pixels`.
      matches: references matched to the faces.
      reference_mask: False on padding.
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
    distractors: Float[ArrayLike, "R E"] | None = None,
    places: PlaceTargets | None = None,
) -> dict[str, Float[ArrayLike, " B"]]:
    """Compute every term of the reward and the metrics that share its matching, each [B] in fp32.

    `terms_of_faces` lists the terms.

    Args:
      videos: values in [-1, 1].
      boxes: x0 y0 x1 y1 of the faces in pixels.
      landmarks: x, y of the faces' landmarks in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      photos: `photo_copy.photo_crops` of the references.
      reference_mask: False on padding.
      config: constants of the reward.
      distractors: unit vectors of the references of all prompts; None leaves out the terms that
        need them.
      places: where the people should stand; None leaves out `placed`.
    """
    faces = (embeddings, face_mask, references, reference_mask)
    matches = match_videos(*faces, config.null_similarity)
    pixels = read_pixels(videos, boxes, landmarks, face_mask, matches, photos, config.copies)
    height, width = videos.shape[2:4]
    size = height, width
    return terms_of_faces(pixels, matches, boxes, *faces, size, config, distractors, places)


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
    distractors: Float[ArrayLike, "R E"] | None = None,
    places: PlaceTargets | None = None,
) -> dict[str, Float[ArrayLike, " B"]]:
    """Compute the terms from faces and the measurements of `read_pixels`, each [B] in fp32.

      reward: the objective of training.
      identity_mean, identity_soft_min, extra, motion: terms of the reward.
      costs: sum of the weighted penalties, which is subtracted.
      similarity, similarity_min: raw cosine of the matched faces, missing = 0, mean over frames;
        mean (or minimum) over people.
      faces_found: matched people, mean over frames.
      faces_seen: detected faces, mean over frames.
      faces_asked: requested people.
      faces_share: detected faces per requested person, at most 1, mean over frames.
      count_accuracy, stalled, unique_faces: see the functions of these names.
      largest_face: see `largest_face_similarity`.
      mimr: see `multi_identity_matching`.
      id_conf: see `identity_confidence`.
      missing, duplicated, swapped, switched, blended, area: see `tracks.penalties`.
      copied, apart, detail: see `of_photos`.
      confused: see `matching.confusion`.
      recognised_log, unrecognised: see `distractors`.
      placed: see `placed`.
      turning, faces_frontal, similarity_frontal and so on: see `turns`.

    Args:
      pixels: measurements of `read_pixels`.
      matches: references matched to the faces.
      boxes: x0 y0 x1 y1 of the faces in pixels.
      embeddings: unit vectors of the faces.
      face_mask: False on padding.
      references: unit vectors of the references.
      reference_mask: False on padding.
      size: height and width of the frames in pixels.
      config: constants of the reward.
      distractors: unit vectors of the references of all prompts; None leaves out the terms that
        need them.
      places: where the people should stand; None leaves out `placed`.
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
    prices["confused"] = confusion(cosine, matches, reference_mask)
    if distractors is not None:
        known = references, reference_mask, distractors
        compared |= recognition(embeddings, matches, *known, config.high)
        prices["unrecognised"] = compared.pop("unrecognised")
    costs = config.extra_weight * extra + config.motion_weight * stillness
    # The judge has no distractors.
    priced = (pair for pair in config.penalties if pair[0] in prices)
    costs = costs + sum(weight * prices[name] for name, weight in priced)
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
    if places is not None:
        terms["placed"] = placed(matches, boxes, reference_mask, size, places)
    if config.yaw is not None:
        shown = matches.similarity, matches.matched, reference_mask
        terms |= turn_terms(pixels.turn, *shown, config.yaw)
    return {name: value.astype(jnp.float32) for name, value in terms.items()}


def term_names(config: IdentityConfig, contrasted: bool = False) -> tuple[str, ...]:
    """Return the names of the terms of `reward_terms`, derived from shapes only.

    Args:
      config: constants of the reward.
      contrasted: there are distractors.
    """

    def zeros(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    one, people = jax.ShapeDtypeStruct((1, 2, 1), jnp.bool), jax.ShapeDtypeStruct((1, 1), jnp.bool)
    seen = zeros(1, 2, 8, 8, 3), zeros(1, 2, 1, 4), zeros(1, 2, 1, 5, 2), zeros(1, 2, 1, 4), one
    known = zeros(1, 1, 4), zeros(1, 1, photo_copy.SIDE, photo_copy.SIDE, 3), people
    distractors = zeros(1, 4) if contrasted else None
    terms = functools.partial(reward_terms, config=config)
    return tuple(jax.eval_shape(terms, *seen, *known, distractors=distractors))


# Value of an unmatched reference: lower than any gain from exchanging cosines among a dozen people.
ALWAYS = -50.0


def multi_identity_matching(
    cosine: Float[Array, "B T M K"],
    face_mask: Bool[Array, "B T K"],
    reference_mask: Bool[Array, "B M"],
) -> Float[Array, " B"]:
    """Compute MIMR, a signed mean of the cosines of all reference-face pairs, in [-1, 1].

    Pairs of the best assignment count +1, other pairs -1; a frame without a face counts 0. The
    assignment has as many pairs as possible, regardless of similarity. The metric separates
    identities; a missing person changes only the mean.

    Source: UMO, arXiv 2509.06818 (bytedance/UMO).

    Args:
      cosine: cosines of references and faces.
      face_mask: False on padding.
      reference_mask: False on padding.
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
) -> Float[Array, " B"]:
    """Compute ID-Conf, the mean over people of clip(1 - second / first, 0, 1).

    First and second are the two largest cosines of a reference to the faces of a frame. With one
    face, the second is 0. If the first is not positive, the person is absent and the confidence is
    0.

    Source: UMO, arXiv 2509.06818.

    Args:
      cosine: cosines of references and faces.
      face_mask: False on padding.
      reference_mask: False on padding.
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
) -> Float[Array, " B"]:
    """Compute 1 - the maximum cosine of two faces of a frame, in [0, 2], without references.

    A frame with fewer than two faces counts 0.5.

    Source: the term within one image of DisCo, arXiv 2510.01399. DisCo's terms across images reward
    diversity, which contradicts fixed references.
    """
    several = jnp.sum(face_mask, -1) > 1
    return jnp.mean(jnp.where(several, 1 - most_alike(embeddings, face_mask), 0.5), axis=1)
