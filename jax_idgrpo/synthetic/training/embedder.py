"""Train a bundled face embedder on synthetic people: the reward's (ArcFace) or the judge's.

The two differ in network, crop, people and seed. Each of N people is a class with a unit centre w.
The loss of an embedding of person y at angle theta_y from the centre of y is

    -log( e^{s cos(theta_y + m)} / (e^{s cos(theta_y + m)} + sum_{j != y} e^{s cos theta_j}) )

(ArcFace, arXiv 1801.07698). Crops of portraits and frames are aligned with landmarks jittered to
match the detector's error.

Options (`finetune.options`): architecture ("arcface" or "judge"), network (fields of its
configuration), name of the stored file, units (width of the crop in head units), people (N),
first_id (first id of the training people), margin m, scale s, blur (largest blur width in pixels).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo.config import Config
from jax_idgrpo.models.faces.arcface import ArcFace, ArcFaceConfig
from jax_idgrpo.models.faces.bundled_judge import Judge, JudgeConfig
from jax_idgrpo.rewards.faces import Points, Settings, align, load_network, normalise, save_network
from jax_idgrpo.synthetic.people import MAX_PEOPLE, SPLITS
from jax_idgrpo.synthetic.training.detector import SEEN
from jax_idgrpo.synthetic.training.faces import (
    FacePictures,
    degrade,
    draw_frames,
    draw_portraits,
    join,
)
from jax_idgrpo.training.task import Task

# The landmarks of an average head seen from the front, in head units from the face's centre.
_HEAD = ((-0.36, -0.05), (0.36, -0.05), (0.0, 0.31), (-0.295, 0.60), (0.295, 0.60))
PORTRAIT = (64, 64)  # height and width of the portraits that start the class centres
_MIDDLE = -0.1  # height of the crop's centre, in head units
_JITTER = 0.06  # standard deviation of the landmark error, relative to the eye-mouth distance


def template(size: int, units: float) -> Points:
    """Return the landmarks in a crop of `size` pixels that is `units` head units wide."""
    per_unit, middle = size / units, (size - 1) / 2
    return tuple((middle + u * per_unit, middle + (v - _MIDDLE) * per_unit) for u, v in _HEAD)


class Classifier(nnx.Module):
    """An embedder with the class centres of its training people."""

    def __init__(self, embedder: ArcFace | Judge, people: int, rngs: nnx.Rngs):
        self.embedder = embedder
        self.centres = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (people, embedder.config.embedding_size))
        )

    def __call__(self, crops: Float[Array, "N S S 3"]) -> Float[Array, "N P"]:
        """Compute the cosines of the crops' embeddings with every centre."""
        return normalise(self.embedder(crops, train=True)) @ normalise(self.centres[...]).T


def arcface_loss(
    cosines: Float[Array, "N P"],
    person: Int[Array, " N"],
    weight: Float[Array, " N"],
    margin: float,
    scale: float,
) -> tuple[Array, dict[str, Array]]:
    """Compute the weighted additive angular margin loss, and the accuracy without margin.

    Args:
      cosines: cosines with the class centres.
      person: class of each crop.
      weight: weight of each crop.
      margin: additive angle m in radians.
      scale: scale s of the cosines.
    """
    own = jnp.take_along_axis(cosines, person[:, None], 1)[:, 0]
    sine = jnp.sqrt(jnp.maximum(1.0 - own * own, 1e-6))
    harder = jnp.where(
        own > -jnp.cos(margin),
        own * jnp.cos(margin) - sine * jnp.sin(margin),
        own - margin * jnp.sin(margin),
    )
    mine = jax.nn.one_hot(person, cosines.shape[1], dtype=bool)
    log_probability = jax.nn.log_softmax(scale * jnp.where(mine, harder[:, None], cosines))
    losses = -jnp.take_along_axis(log_probability, person[:, None], 1)[:, 0]
    total = jnp.maximum(jnp.sum(weight), 1.0)
    right = jnp.argmax(cosines, 1) == person
    return jnp.sum(weight * losses) / total, {"accuracy": jnp.sum(weight * right) / total}


@functools.partial(jax.jit, static_argnames=("rows", "size"))
def draw(
    seed: int | Array,
    step: int | Array,
    rows: int,
    people: int | Array,
    first_id: int | Array,
    size: tuple[int, int] = (64, 64),
) -> FacePictures:
    """Render `rows` frames of up to three people, and one portrait for each row.

    Args:
      seed: seed of people and scenes.
      step: number of the batch.
      rows: number of frames, and of portraits.
      people: number of training people.
      first_id: first id of these people.
      size: (height, width) in pixels.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), 5)
    part = people // MAX_PEOPLE
    ids = (
        first_id
        + jax.random.randint(keys[0], (rows, MAX_PEOPLE), 0, part)
        + part * jnp.arange(MAX_PEOPLE)
    )
    count = 1 + jax.random.choice(keys[1], 3, (rows,), p=jnp.array([0.2, 0.3, 0.5]))
    mask = jnp.arange(MAX_PEOPLE) < count[:, None]
    ids = jax.random.permutation(keys[2], ids, axis=1, independent=True)
    return join(draw_frames(keys[3], ids, mask, size), draw_portraits(keys[4], ids[:, -1], size))


def crops_of(
    key: Array, truth: FacePictures, points: Points, size: int, blur: float | None
) -> tuple[Float[Array, "N S S 3"], Int[Array, " N"], Bool[Array, " N"]]:
    """Align the crops of a `draw`: the three slots of each frame, then the portraits.

    A slot without a visible face is filled with the row's portrait, so that batch statistics are
    computed over faces.

    Args:
      key: key of blur and jitter.
      truth: annotated pictures.
      points: landmarks in the crop.
      size: size of the crop in pixels.
      blur: see `degrade`; None for clean pictures and exact landmarks.

    Returns:
      The crops, their ids, and the mask of the slots that show the person's face.
    """
    degrade_key, jitter_key = jax.random.split(key)
    rows = truth.ids.shape[0] // 2
    pictures, landmarks = truth.pictures, truth.landmarks
    if blur is not None:
        height = jnp.linalg.norm(
            jnp.mean(landmarks[:, :, :2], 2) - jnp.mean(landmarks[:, :, 3:], 2), axis=-1
        )
        landmarks = landmarks + _JITTER * height[..., None, None] * jax.random.normal(
            jitter_key, landmarks.shape
        )
        pictures = degrade(degrade_key, pictures, blur)
    frames = align(pictures[:rows], landmarks[:rows], points, size)
    portraits = align(pictures[rows:], landmarks[rows:, :1], points, size)
    seen = truth.visible[:rows] >= SEEN
    frames = jnp.where(seen[..., None, None, None], frames, portraits)
    crops = jnp.concatenate([frames.reshape(-1, size, size, 3), portraits[:, 0]])
    ids = jnp.concatenate([truth.ids[:rows].reshape(-1), truth.ids[rows:, 0]])
    return crops, ids, jnp.concatenate([seen.reshape(-1), jnp.ones(rows, bool)])


def embed_portraits(
    embedder: nnx.Module, points: Points, ids: Int[Array, " N"], chunk: int = 50
) -> Float[Array, "N E"]:
    """Embed one portrait of each person: initial class centres for a trained embedder.

    Args:
      embedder: trained embedder.
      points: landmarks in the crop.
      ids: ids of the people.
      chunk: people per batch.
    """
    graph, state = nnx.split(embedder)

    @jax.jit
    def embed(state: Any, ids: Array) -> Array:
        portraits = draw_portraits(jax.random.key(0), ids, PORTRAIT)
        return normalise(
            nnx.merge(graph, state)(
                align(portraits.pictures, portraits.landmarks, points, embedder.config.input_size)[
                    :, 0
                ]
            )
        )

    padded = jnp.pad(ids, (0, -len(ids) % chunk)).reshape(-1, chunk)
    return jnp.concatenate([embed(state, part) for part in padded])[: len(ids)]


def area_under_curve(same: np.ndarray, different: np.ndarray) -> float:
    """Compute the probability that two pictures of one person are more similar than of two."""
    ranks = np.searchsorted(np.sort(different), same, side="left") + np.searchsorted(
        np.sort(different), same, side="right"
    )
    return float(np.mean(ranks) / (2 * len(different)))


def verify(
    embedder: nnx.Module,
    points: Points,
    blur: float | None,
    rows: int,
    size: tuple[int, int] = (64, 64),
    rounds: int = 12,
) -> dict[str, float]:
    """Verify portraits against frames of held-out people.

    Args:
      embedder: embedder to evaluate.
      points: landmarks in the crop.
      blur: see `degrade`; None for clean pictures.
      rows: frames per round.
      size: (height, width) of the pictures.
      rounds: number of rounds.

    Returns:
      The AUC, and quantiles of the cosines of same and different people.
    """
    crop = embedder.config.input_size
    graph, state = nnx.split(embedder)
    first, last = SPLITS["eval"]

    @jax.jit
    def embed(state, truth, key):
        crops, ids, seen = crops_of(key, truth, points, crop, blur)
        return normalise(nnx.merge(graph, state)(crops)), ids, seen

    same, different = [], []
    for number in range(rounds):
        truth = draw(7, number, rows, last - first, first, size)
        embeddings, ids, seen = (np.asarray(x) for x in embed(state, truth, jax.random.key(number)))
        slots = rows * MAX_PEOPLE
        frames, portraits = np.flatnonzero(seen[:slots]), np.arange(slots, len(ids))
        cosines = embeddings[frames] @ embeddings[portraits].T
        match = ids[frames][:, None] == ids[portraits][None]
        same.append(cosines[match])
        different.append(cosines[~match])
    of_one, of_two = np.concatenate(same), np.concatenate(different)
    quantiles = (0.05, 0.5, 0.95)
    return {
        "auc": area_under_curve(of_one, of_two),
        **{f"same_{q}": float(np.quantile(of_one, q)) for q in quantiles},
        **{f"different_{q}": float(np.quantile(of_two, q)) for q in (*quantiles, 0.999)},
    }


def make(config: Config) -> Task:
    """Make the task of `configs/embedded_embedder.py` and `configs/embedded_judge.py`."""
    options: dict[str, Any] = dict(config.finetune.options)
    network, schema = {"arcface": (ArcFace, ArcFaceConfig), "judge": (Judge, JudgeConfig)}[
        options["architecture"]
    ]
    sizes = schema(**options["network"])
    points = template(sizes.input_size, options["units"])
    first_id, people, rows = options["first_id"], options["people"], config.finetune.batch

    def init(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        if not config.finetune.start:
            return Classifier(network(sizes, rngs=rngs), people, rngs)
        embedder = load_network(Path(config.finetune.start) / options["name"])[0]
        classifier = Classifier(embedder, people, rngs)
        classifier.centres[...] = embed_portraits(embedder, points, first_id + jnp.arange(people))
        return classifier

    def batch(seed: int, step: int) -> FacePictures:
        return draw(seed, step, rows, people, first_id, config.video.size)

    def loss(
        module: nnx.Module, truth: FacePictures, key: jax.Array
    ) -> tuple[Array, dict[str, Array]]:
        crops, ids, seen = crops_of(key, truth, points, sizes.input_size, options["blur"])
        person = jnp.maximum(ids - first_id, 0)
        return arcface_loss(
            module(crops), person, seen.astype(jnp.float32), options["margin"], options["scale"]
        )

    def save(module: nnx.Module, folder: Path) -> None:
        levels = {
            name: verify(module.embedder, points, blur, rows, config.video.size)
            for name, blur in (("clean", None), ("degraded", options["blur"]))
        }
        save_network(
            module.embedder,
            Path(folder) / options["name"],
            template=points,
            levels=levels,
            **dataclasses.asdict(Settings()),
        )

    return Task(init=init, batch=batch, loss=loss, save=save)
