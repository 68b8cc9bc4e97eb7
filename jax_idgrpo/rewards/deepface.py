"""Find faces on the host with deepface, as a backend of the face reward.

`reward.backend` "deepface:DETECTOR/MODEL" names detector and model as deepface does
("deepface:retinaface/ArcFace"). The model "embedder" is the embedder in the folder `reward.faces`.
All faces are scored by `identity.reward_terms`. The backend differs from the face stack in

    detection   the detector's own threshold decides; the largest 8 faces of a frame are kept,
                largest first
    pixels      whole grey levels, RGB, at the size of the video; monochrome has equal channels
    crops       a model of deepface gets deepface's own crop (rotated by the eyes, letterboxed);
                the embedder of `reward.faces` gets the similarity from the detector's landmarks
                to its template, or from the box if there are fewer than two landmarks
    gradients   none

"opencv" is the only detector that works without a download (Haar cascades, which come with OpenCV).
It finds frontal upright faces of 30 pixels or more, and misses smaller faces, profiles and rotated
pictures. Photos are rotated upright by their EXIF orientation when they are read
(`data.prompts.load_reference`). A frame without a face has no faces; it is never embedded whole.

All threads share deepface's models, which are not thread-safe (OpenCV's cascades fail), so a lock
admits one thread at a time. deepface's libraries use several cores by themselves. Missing weights
are downloaded to `$DEEPFACE_HOME/.deepface/weights` (default: the home folder).
"deepface:opencv/embedder" reads and writes nothing there. Source: PyPI deepface 0.0.103, MIT.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, UInt8
from PIL import Image

from checkpoints_convert.faces import ARCFACE_TEMPLATE, FACES
from jax_idgrpo.data.video import from_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import ReferenceFaces, frame_numbers
from jax_idgrpo.rewards.faces import align, load_embedder, normalise
from jax_idgrpo.rewards.host import HostPool, Pending
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms, term_names
from jax_idgrpo.rewards.photo_faces import PhotoEncoder, PhotoFace, levels, padded, photo_crop
from jax_idgrpo.rewards.placed import PlaceTargets

OWN = "embedder"
# Left and right are the person's, so the left of the picture comes first.
LANDMARKS = ("right_eye", "left_eye", "nose", "mouth_right", "mouth_left")
# Corners of a detector's box whose landmarks coincide with ARCFACE_TEMPLATE.
TEMPLATE_BOX = np.array([[16.0, 22.0], [96.0, 102.0]])
_ONE_AT_A_TIME = threading.Lock()


class Face(NamedTuple):
    """A face that deepface found.

    Attributes:
      box: x0 y0 x1 y1 in pixels.
      landmarks: x, y in pixels, in the order of `LANDMARKS`.
      crop: deepface's own crop, RGB in [0, 1].
    """

    box: Float[np.ndarray, "4"]
    landmarks: Float[np.ndarray, "5 2"]
    crop: Float[np.ndarray, "h w 3"]


Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Embed = Callable[
    [UInt8[np.ndarray, "T H W 3"], Sequence[int], Sequence[Face]], Float[np.ndarray, "N E"]
]
"""Embeds faces, given the frames, the frame index of each face, and the faces."""


def complete(
    box: Float[np.ndarray, "4"], known: Mapping[int, tuple[float, float]]
) -> Float[np.ndarray, "5 2"]:
    """Complete five landmarks: missing ones are placed by the template.

    The template is fitted to the known landmarks by a least-squares similarity, or to the box if
    fewer than two are known.

    Args:
      box: x0 y0 x1 y1 in pixels.
      known: x, y of the known landmarks by index in `LANDMARKS`.
    """
    template = np.asarray(ARCFACE_TEMPLATE)
    few = len(known) < 2
    p = (TEMPLATE_BOX if few else template[list(known)]) @ [1, 1j]
    q = (box.reshape(2, 2) if few else np.array(list(known.values()))) @ [1, 1j]
    a = np.vdot(p - p.mean(), q - q.mean()) / np.vdot(p - p.mean(), p - p.mean())
    placed = a * (template @ [1, 1j] - p.mean()) + q.mean()
    points = np.stack([placed.real, placed.imag], -1)
    for number, point in known.items():
        points[number] = point
    return points


def find(picture: UInt8[np.ndarray, "H W 3"], detector: str) -> list[Face]:
    """Find the faces of an RGB picture: the largest 8, largest first."""
    from deepface.modules.detection import extract_faces
    from deepface.modules.exceptions import FaceNotDetected

    try:
        found = extract_faces(np.ascontiguousarray(picture[..., ::-1]), detector, max_faces=FACES)
    except FaceNotDetected:
        return []
    faces = []
    for face in found:
        area: dict[str, Any] = face["facial_area"]
        box = np.array([area["x"], area["y"], area["x"] + area["w"], area["y"] + area["h"]], float)
        seen = {
            number: area[name]
            for number, name in enumerate(LANDMARKS)
            if area.get(name) is not None
        }
        known = {number: (float(x), float(y)) for number, (x, y) in seen.items()}
        faces.append(Face(box, complete(box, known), np.asarray(face["face"], float)))
    return sorted(faces, key=lambda face: -float(np.prod(face.box[2:] - face.box[:2])))


def their_embeddings(model: str) -> Embed:
    """Embed deepface's crops with a model of deepface, as `DeepFace.represent` does."""
    from deepface.modules.representation import represent

    def embed(
        frames: UInt8[np.ndarray, "T H W 3"], of: Sequence[int], faces: Sequence[Face]
    ) -> Float[np.ndarray, "N E"]:
        found = represent([face.crop[..., ::-1] for face in faces], model, detector_backend="skip")
        return np.asarray([face[0]["embedding"] for face in (found if len(faces) > 1 else [found])])

    return embed


def our_embeddings(folder: Path) -> Embed:
    """Embed crops aligned by the landmarks with the embedder of a folder, on the host's cores.

    Programs are compiled for 1, 2, 4, ... faces.
    """
    network, template = load_embedder(folder, OWN)
    graph, state = nnx.split(network)
    state = jax.device_put(state, host_device())

    @jax.jit
    def apply(
        state: nnx.State, pictures: Float[Array, "N H W 3"], landmarks: Float[Array, "N 1 5 2"]
    ) -> Float[Array, "N E"]:
        network = nnx.merge(graph, state)
        return network(align(pictures, landmarks, template, network.config.input_size)[:, 0])

    def embed(
        frames: UInt8[np.ndarray, "T H W 3"], of: Sequence[int], faces: Sequence[Face]
    ) -> Float[np.ndarray, "N E"]:
        filled = np.minimum(np.arange(1 << (len(faces) - 1).bit_length()), len(faces) - 1)
        landmarks = np.stack([face.landmarks for face in faces])[filled, None].astype(np.float32)
        return np.asarray(apply(state, from_uint8(frames[np.asarray(of)[filled]]), landmarks))[
            : len(faces)
        ]

    return embed


def host_device() -> jax.Device:
    """Return the host's CPU as a device of JAX, which never waits for the accelerator.

    Raises:
      UserError: JAX is configured without the CPU backend.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "reward.backend needs JAX on the CPU beside the accelerator; add it, as in JAX_PLATFORMS=cuda,cpu"
        ) from None


@contextlib.contextmanager
def _deepface(backend: str):
    """Restore the warning filters that deepface changes, and report its errors in one line."""
    try:
        with warnings.catch_warnings():
            yield
    except ImportError as error:
        raise UserError(
            f"reward.backend {backend}: {error.name or error} is not installed; pip install jax-idgrpo[faces]"
        ) from None
    except UserError:
        raise
    # The type varies: no network, a damaged file, a missing package of a detector.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"reward.backend {backend}: deepface cannot make it ({reason}); install or download what it asks for"
        ) from None


def _checked(backend: str, what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(
            f"reward.backend {backend}: deepface has no {what} {name!r}; use one of {', '.join(names)}"
        )


class DeepFace:
    """Find the faces of the frames of a video with deepface."""

    def __init__(self, backend: str, folder: Path):
        """Build the detector and the model.

        Args:
          backend: "deepface:DETECTOR/MODEL", as in the configuration.
          folder: folder of the embedder, read if the model is "embedder".

        Raises:
          UserError: deepface or a part of it is not installed, or a network is unknown or cannot be
            loaded.
        """
        self.detector, _, model = backend.removeprefix("deepface:").partition("/")
        with _deepface(backend):
            from deepface.commons.folder_utils import initialize_folder
            from deepface.modules.modeling import AVAILABLE_MODELS, build_model

            _checked(backend, "detector", self.detector, list(AVAILABLE_MODELS["face_detector"]))
            _checked(backend, "model", model, [*AVAILABLE_MODELS["facial_recognition"], OWN])
            if (self.detector, model) != ("opencv", OWN):
                initialize_folder()
            build_model("face_detector", self.detector)
            if model == OWN:
                self.embed = our_embeddings(folder)
            else:
                build_model("facial_recognition", model)
                self.embed = their_embeddings(model)

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Found:
        """Find boxes [T, K, 4], landmarks [T, K, 5, 2], unit embeddings [T, K, E], mask [T, K]."""
        with _ONE_AT_A_TIME:
            found = [find(frame, self.detector) for frame in frames]
            places = [(t, k) for t, faces in enumerate(found) for k in range(len(faces))]
            embeddings = (
                self.embed(frames, [t for t, _ in places], [found[t][k] for t, k in places])
                if places
                else np.zeros((0, 1))
            )
        boxes, mask = (
            np.zeros((len(frames), FACES, 4), np.float32),
            np.zeros((len(frames), FACES), bool),
        )
        landmarks = np.zeros((len(frames), FACES, 5, 2), np.float32)
        vectors = np.zeros((len(frames), FACES, embeddings.shape[1]), np.float32)
        for (t, k), vector in zip(
            places, np.asarray(normalise(jnp.asarray(embeddings, jnp.float32))), strict=True
        ):
            boxes[t, k], landmarks[t, k], mask[t, k], vectors[t, k] = (
                found[t][k].box,
                found[t][k].landmarks,
                True,
                vector,
            )
        return boxes, landmarks, vectors, mask


class HostFaceReward:
    """Compute the identity reward on faces that a function finds on the host; has no gradient."""

    reported = ("similarity",)
    motion_of_all_frames = False

    def __init__(
        self,
        faces: Callable[[UInt8[np.ndarray, "T H W 3"]], Found],
        config: IdentityConfig,
        frames: int = 0,
        pool: HostPool | None = None,
        photo_pool: bool = False,
    ):
        """Set up the reward and its threads.

        Args:
          faces: finds boxes, landmarks, embeddings and mask of a video, as `DeepFace` does.
          config: constants of the identity reward.
          frames: number of evenly spaced frames to score; 0 scores all.
          pool: threads that score the videos; a new pool by default.
          photo_pool: whether a person is compared with the mean of all their photos.
        """
        self.faces, self.frames, self.config = faces, frames, config
        self._pool, self._device = pool or HostPool(), host_device()
        self._reward = jax.jit(functools.partial(reward_terms, config=config))
        self._distractors: Float[np.ndarray, "R E"] | None = None
        self.encode_references = PhotoEncoder(
            self._photo_face, config.null_similarity if photo_pool else None
        )

    def contrast(self, distractors: Float[np.ndarray, "R E"]) -> None:
        """Compare people with distractors from now on, as `FaceReward.contrast` does."""
        self._distractors = distractors

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of every video."""
        return term_names(self.config, self._distractors is not None)

    def _photo_face(self, image: Image.Image) -> PhotoFace | None:
        """Return the largest face of a photo; None if the photo shows none."""
        (level,) = levels(image, pyramid=False)
        _, landmarks, embeddings, mask = (
            leaf[0] for leaf in self.faces(padded(level.pixels)[None])
        )
        if not mask[0]:
            return None
        with jax.default_device(self._device):
            crop = photo_crop(image, level.photo(landmarks[0]))
        return PhotoFace(embeddings[0], crop, int(mask.sum()))

    def _score(
        self,
        frames: UInt8[np.ndarray, "T H W 3"],
        references: np.ndarray,
        crops: np.ndarray,
        asked: np.ndarray,
        *places: np.ndarray,
    ) -> dict[str, float]:
        boxes, landmarks, embeddings, mask = self.faces(frames)
        if not mask.any():  # the embedding size is unknown without a face
            embeddings = np.zeros((*mask.shape, references.shape[-1]), np.float32)
        with jax.default_device(self._device):
            given = (
                from_uint8(frames),
                boxes,
                landmarks,
                embeddings,
                mask,
                references,
                crops,
                asked,
            )
            video = (jnp.asarray(leaf)[None] for leaf in given)
            targets = PlaceTargets(*(leaf[None] for leaf in places)) if places else None
            terms = jax.device_get(
                self._reward(*video, distractors=self._distractors, places=targets)
            )
        return {name: float(value[0]) for name, value in terms.items()}

    def frames_read(self, total: int) -> np.ndarray | None:
        """Return the indices of the scored frames of a video of `total` frames; None for all."""
        return frame_numbers(total, self.frames) if self.frames else None

    def score(self, videos: Float[ArrayLike, "B T H W 3"], encoded: ReferenceFaces) -> Pending:
        """Start computing every term (see `identity.reward_terms`) without waiting for them."""
        known = (encoded.embeddings, encoded.crops, encoded.mask)
        places = jax.tree.leaves(encoded.places)
        batch = (_pixels(self.frames, videos), *known, *places)
        return self._pool.submit(self._score, batch, "face reward")


@functools.partial(jax.jit, static_argnums=0)
def _pixels(frames: int, videos: Float[Array, "B T H W 3"]) -> UInt8[Array, "B t H W 3"]:
    """Return the scored frames as bytes, converted on the device so that a quarter is copied."""
    chosen = videos[:, frame_numbers(videos.shape[1], frames)].astype(jnp.float32)
    return jnp.round((jnp.clip(chosen, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
