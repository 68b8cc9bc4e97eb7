"""Train the bundled face detector on synthetic people.

The target of the score map is 1 at the centre of a face and decays around it. The score is trained
with the quality focal loss

    |y - p|^2 (-y log p - (1 - y) log(1 - p))        (arXiv 2006.04388)

and the four sides and five landmarks near a face's centre with an L1 loss. The surroundings of
mostly hidden faces have no loss. The constants of the yaw (`rewards.turns`) are fitted to the
landmarks at the end, and stored if the landmarks show the yaw.

Options (`finetune.options`): network (fields of `DetectorConfig`), max_faces and threshold (stored
with the weights), portraits (share of portraits in a batch), blur (largest blur width in pixels),
landmarks (loss weight of a pixel of landmark error, 0.3 by default).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.config import Config
from jax_idgrpo.models.faces.bundled_detector import (
    Detector,
    DetectorConfig,
    DetectorOutput,
    cell_centres,
    decode,
    intersection_over_union,
)
from jax_idgrpo.rewards.faces import load_network, save_network
from jax_idgrpo.rewards.turns import BINS, YawCalibration, fit_yaw, head_turn
from jax_idgrpo.rewards.turns import yaw as yaw_of
from jax_idgrpo.synthetic import people, scenes
from jax_idgrpo.synthetic.training.faces import (
    FacePictures,
    degrade,
    draw_frames,
    draw_portraits,
    join,
)
from jax_idgrpo.training.task import Task

# Visible shares of the face oval from which a face must be found, and up to which it must not.
SEEN, HIDDEN = 0.4, 0.1
# For the yaw: clips per batch, the last frame that is read, and clips of each measurement.
HEADS, LAST, YAW_CLIPS = 16, 8, 400
LEAST_CORRELATION = 0.9
"""Correlation with the true yaw below which a detector is stored without constants of the yaw."""


@functools.partial(jax.jit, static_argnames=("frames", "portraits", "size"))
def draw(
    seed: int | Array,
    step: int | Array,
    frames: int,
    portraits: int,
    first_id: int | Array,
    last_id: int | Array,
    size: tuple[int, int] = (64, 64),
) -> FacePictures:
    """Render frames and portraits of random people: a pure function of the arguments.

    Args:
      seed: seed of people and scenes.
      step: number of the batch.
      frames: number of frames.
      portraits: number of portraits.
      first_id, last_id: range of the people's ids; last_id is exclusive.
      size: (height, width) in pixels.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), 5)
    ids = jax.random.randint(keys[0], (frames, people.MAX_PEOPLE), first_id, last_id)
    clips = draw_frames(keys[2], ids, scenes.sample_mask(keys[1], frames), size)
    shown = jax.random.randint(keys[3], (portraits,), first_id, last_id)
    return join(clips, draw_portraits(keys[4], shown, size))


def targets(
    truth: FacePictures, height: int, width: int
) -> tuple[Float[Array, "N M h w"], Float[Array, "N M h w"]]:
    """Compute score targets in [0, 1] of each face: for visible faces, and for ignored faces.

    Args:
      truth: annotated pictures.
      height, width: size of the score map.
    """
    centre = 0.5 * (truth.boxes[..., :2] + truth.boxes[..., 2:])
    size = jnp.maximum(truth.boxes[..., 2:] - truth.boxes[..., :2], 1.0)
    offset = (cell_centres(height, width) - centre[:, :, None, None]) / size[:, :, None, None]
    # Normalise so that the cell nearest to the centre is exactly 1.
    distance = jnp.sum(offset**2, -1)
    distance = distance - jnp.min(distance, (-2, -1), keepdims=True)
    near = jnp.exp(-0.5 * distance / 0.12**2)
    seen = truth.visible[..., None, None]
    return near * (seen >= SEEN), near * ((seen < SEEN) & (seen > HIDDEN))


def detector_loss(
    output: DetectorOutput, truth: FacePictures, landmarks: float = 0.3
) -> tuple[Array, dict[str, Array]]:
    """Compute the scalar loss and its parts.

    Args:
      output: maps of the detector.
      truth: annotated pictures.
      landmarks: weight of the landmark error in pixels.
    """
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
    box, marks = pick(truth.boxes, owner), pick(truth.landmarks, owner)
    sides = jnp.concatenate([centres - box[..., :2], box[..., 2:] - centres], -1)
    points = marks - centres[:, :, None]
    box_error = jnp.sum(weight * jnp.mean(jnp.abs(output.sides - sides), -1))
    point_error = jnp.sum(weight * jnp.mean(jnp.abs(output.points - points), (-2, -1)))
    loss = score + 0.15 * box_error + landmarks * point_error
    return loss, {"score_loss": score, "box_error": box_error, "landmark_error": point_error}


def levels(
    module: nnx.Module,
    frames: int,
    portraits: int,
    faces: int,
    threshold: float,
    blur: float,
    size: tuple[int, int] = (64, 64),
    rounds: int = 8,
) -> dict[str, float]:
    """Measure recall, false detections per picture and landmark error on held-out people.

    A detection is correct from an overlap of 0.5. The landmark error is in pixels.

    Args:
      module: detector.
      frames: frames per round.
      portraits: portraits per round.
      faces: largest number of detections per picture.
      threshold: smallest score of a detection.
      blur: largest blur width in pixels.
      size: (height, width) in pixels.
      rounds: number of rounds.
    """
    graph, state = nnx.split(module)

    @jax.jit
    def measure(state: Any, truth: FacePictures, key: Array) -> dict[str, Array]:
        found = decode(
            nnx.merge(graph, state)(degrade(key, truth.pictures, blur)), faces, threshold
        )
        overlap = (
            intersection_over_union(found.boxes[:, :, None], truth.boxes[:, None])
            * found.mask[..., None]
        )
        wanted = truth.visible >= SEEN
        hit = wanted & (jnp.max(overlap, 1) >= 0.5)
        nearest = jax.vmap(lambda points, k: points[k])(found.landmarks, jnp.argmax(overlap, 1))
        error = jnp.mean(jnp.abs(nearest - truth.landmarks), (-2, -1))
        real = jnp.max(overlap * (truth.visible > HIDDEN)[:, None], 2) >= 0.3
        return {
            "wanted": jnp.sum(wanted),
            "hit": jnp.sum(hit),
            "wrong": jnp.sum(found.mask & ~real),
            "error": jnp.sum(hit * error),
        }

    sums: dict[str, float] = {}
    for number in range(rounds):
        truth = draw(7, number, frames, portraits, *people.SPLITS["eval"], size)
        for name, value in jax.device_get(measure(state, truth, jax.random.key(number))).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    pictures = rounds * (frames + portraits)
    recall, error = sums["hit"] / max(sums["wanted"], 1), sums["error"] / max(sums["hit"], 1)
    return {"recall": recall, "wrong": sums["wrong"] / pictures, "landmark_error": error}


def heads(
    detector: nnx.Module,
    split: str,
    clips: int,
    size: tuple[int, int],
    faces: int,
    threshold: float,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Measure rendered heads: their turn by the landmarks that are found, and their yaw in degrees.

    A face counts if its landmarks are on average within a quarter of the face's width.

    Args:
      detector: finds the landmarks.
      split: people of the clips.
      clips: number of clips, of which the first, middle and last frame are read.
      size: (height, width) of the clips in pixels.
      faces: largest number of detections per picture.
      threshold: smallest score of a detection.
    """
    graph, state = nnx.split(detector)
    find = jax.jit(lambda state, pictures: nnx.merge(graph, state).find(pictures, faces, threshold))
    poses = jax.jit(lambda scene, time: jax.vmap(lambda one: scenes.pose_at(one, time).yaw)(scene))
    turns, truth = [], []
    for step in range(-(-clips // HEADS)):
        drawn = jax.device_get(scenes.batch(1, step, HEADS, split, LAST + 1, size))
        for frame in (0, LAST // 2, LAST):
            found = jax.device_get(find(state, jnp.asarray(drawn.video[:, frame])))
            yaw = np.asarray(poses(drawn.scene, frame / scenes.FRAMES_PER_SECOND))
            rows, slots = np.nonzero(drawn.mask & (drawn.visible[:, frame] > 0.8))
            marks = drawn.landmarks[rows, frame, slots] - 0.5
            off = np.linalg.norm(found.landmarks[rows] - marks[:, None], axis=-1).mean(-1)
            off = np.where(found.mask[rows], off, np.inf)
            width = drawn.boxes[rows, frame, slots, 2] - drawn.boxes[rows, frame, slots, 0]
            near = off.min(1) < width / 4
            best = found.landmarks[rows, off.argmin(1)]
            turns.append(np.asarray(head_turn(best))[near])
            truth.append(np.degrees(yaw[rows, slots])[near])
    return np.concatenate(turns), np.concatenate(truth)


def yaw_levels(
    turns: Float[np.ndarray, " N"], truth: Float[np.ndarray, " N"], calibration: YawCalibration
) -> dict[str, float]:
    """Measure estimated yaw: correlation with the truth, mean error in degrees, share in the right bin.

    Args:
      turns: as `heads` measures them.
      truth: yaw in degrees.
      calibration: constants of the yaw.
    """
    estimated = np.asarray(yaw_of(turns, calibration))
    edges = [low for low, _ in BINS.values()][1:]
    right = np.digitize(np.abs(estimated), edges) == np.digitize(np.abs(truth), edges)
    return {
        "faces": float(len(truth)),
        "correlation": float(np.corrcoef(estimated, truth)[0, 1]),
        "error": float(np.mean(np.abs(estimated - truth))),
        "right_bin": float(np.mean(right)),
    }


def make(config: Config) -> Task:
    """Make the task of `configs/embedded_detector.py`."""
    options: dict[str, Any] = dict(config.finetune.options)
    portraits = round(config.finetune.batch * options["portraits"])
    frames, blur = config.finetune.batch - portraits, options["blur"]
    size = config.video.size
    network = DetectorConfig(**options["network"])
    stored = {"max_faces": options["max_faces"], "threshold": options["threshold"]}

    def init(key: jax.Array) -> nnx.Module:
        if config.finetune.start:
            return load_network(Path(config.finetune.start) / "detector")[0]
        return Detector(network, rngs=nnx.Rngs(key))

    def batch(seed: int, step: int) -> FacePictures:
        return draw(seed, step, frames, portraits, *people.SPLITS["train"], size)

    def loss(
        module: nnx.Module, truth: FacePictures, key: jax.Array
    ) -> tuple[Array, dict[str, Array]]:
        found = module(degrade(key, truth.pictures, blur))
        return detector_loss(found, truth, options.get("landmarks", 0.3))

    def save(module: nnx.Module, folder: Path) -> None:
        measured = {
            name: levels(
                module,
                frames,
                portraits,
                options["max_faces"],
                options["threshold"],
                strength,
                size,
            )
            for name, strength in (("sharp", 0.0), ("blurred", blur))
        }
        found = size, options["max_faces"], options["threshold"]
        calibration = fit_yaw(*heads(module, "train", YAW_CLIPS, *found))
        measured["yaw"] = yaw_levels(*heads(module, "eval", YAW_CLIPS, *found), calibration)
        yaw = {}
        if measured["yaw"]["correlation"] >= LEAST_CORRELATION:
            yaw = {"yaw": dataclasses.asdict(calibration)}
        save_network(module, Path(folder) / "detector", levels=measured, **stored, **yaw)

    return Task(init=init, batch=batch, loss=loss, save=save)
