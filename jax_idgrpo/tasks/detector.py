"""Training of the face detector on the cast.

The map's target is 1 where a face is centred and falls off around it; its loss is the quality focal loss

    |y - p|^2 (-y log p - (1 - y) log(1 - p))        (arXiv 2006.04388)

and near a face's centre the four sides and five landmarks are regressed with an L1 loss. Faces that are mostly hidden are
neither right nor wrong: their surroundings carry no loss.

Options (`finetune.options`): network (fields of `DetectorConfig`), max_faces, threshold (stored beside the weights), share of
portraits in a batch.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.config import Config
from jax_idgrpo.data import cast
from jax_idgrpo.models.detector import Detector, DetectorConfig, DetectorOutput, cell_centres
from jax_idgrpo.rewards.faces import load_network, save_network
from jax_idgrpo.tasks import Task
from jax_idgrpo.tasks.drawn_faces import FacePictures, degrade, draw_frames, draw_portraits, join

SEEN, HIDDEN = 0.4, 0.1  # shares of the face oval: a face, and not a face


@functools.partial(jax.jit, static_argnames=("frames", "portraits", "split"))
def draw(seed: int, step: int, frames: int, portraits: int, split: str) -> FacePictures:
    """Frames and portraits of random people; a pure function of seed and step."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), 5)
    mask = cast.sample_mask(keys[1], frames)
    clips = draw_frames(keys[2], cast.sample_ids(keys[0], frames, split), mask)
    return join(clips, draw_portraits(keys[4], cast.sample_ids(keys[3], portraits, split)[:, 0]))


def targets(truth: FacePictures, height: int, width: int) -> tuple[Float[Array, "N M h w"], Float[Array, "N M h w"]]:
    """How much each cell is the centre of each face, in [0, 1]: for the faces to be found, and for those that do not count."""
    centre = 0.5 * (truth.boxes[..., :2] + truth.boxes[..., 2:])
    size = jnp.maximum(truth.boxes[..., 2:] - truth.boxes[..., :2], 1.0)
    offset = (cell_centres(height, width) - centre[:, :, None, None]) / size[:, :, None, None]
    # The cell nearest to the centre gets exactly 1.
    distance = jnp.sum(offset**2, -1)
    distance = distance - jnp.min(distance, (-2, -1), keepdims=True)
    near = jnp.exp(-0.5 * distance / 0.12**2)
    seen = truth.visible[..., None, None]
    return near * (seen >= SEEN), near * ((seen < SEEN) & (seen > HIDDEN))


def detector_loss(output: DetectorOutput, truth: FacePictures) -> tuple[Array, dict[str, Array]]:
    """Scalar loss, and its parts."""
    height, width = output.logits.shape[1:]
    near, unsure = targets(truth, height, width)
    target = jnp.max(near, 1)
    faces = jnp.maximum(jnp.sum(truth.visible >= SEEN), 1)
    difference = jnp.abs(target - jax.nn.sigmoid(output.logits)) ** 2
    score = difference * optax.sigmoid_binary_cross_entropy(output.logits, target)
    score = jnp.sum(score * (jnp.max(unsure, 1) <= target)) / faces

    owner = jnp.argmax(near, 1)
    weight = target * (target > 0.3)
    weight = weight / jnp.maximum(jnp.sum(weight), 1.0)
    pick = jax.vmap(lambda table, index: table[index])
    centres = cell_centres(height, width)
    box, landmarks = pick(truth.boxes, owner), pick(truth.landmarks, owner)
    sides = jnp.concatenate([centres - box[..., :2], box[..., 2:] - centres], -1)
    points = landmarks - centres[:, :, None]
    box_error = jnp.sum(weight * jnp.mean(jnp.abs(output.sides - sides), -1))
    point_error = jnp.sum(weight * jnp.mean(jnp.abs(output.points - points), (-2, -1)))
    loss = score + 0.15 * box_error + 0.3 * point_error
    return loss, {"score_loss": score, "box_error": box_error, "landmark_error": point_error}


def make(config: Config) -> Task:
    """The task of `configs/embedded_detector.py`."""
    options: dict[str, Any] = dict(config.finetune.options)
    portraits = round(config.finetune.batch * options["portraits"])
    network = DetectorConfig(**options["network"])
    stored = {"max_faces": options["max_faces"], "threshold": options["threshold"]}

    def init(key: jax.Array) -> nnx.Module:
        if config.finetune.start:
            return load_network(Path(config.finetune.start) / "detector")[0]
        return Detector(network, rngs=nnx.Rngs(key))

    def batch(seed: int, step: int) -> FacePictures:
        return draw(seed, step, config.finetune.batch - portraits, portraits, "train")

    def loss(module: nnx.Module, truth: FacePictures, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        return detector_loss(module(degrade(key, truth.pictures)), truth)

    def save(module: nnx.Module, folder: Path) -> None:
        save_network(module, Path(folder) / "detector", **stored)

    return Task(init=init, batch=batch, loss=loss, save=save)
