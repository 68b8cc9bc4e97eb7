"""Detect, align by five landmarks, and embed the faces of a video, as one function of its pixels.

Alignment is the least-squares similarity from the landmarks to a template, and a bilinear warp by
its inverse with a black border. With points as complex numbers, p and q centred, the similarity q =
a p + t is a linear regression:

    a = sum conj(p) q / sum |p|^2,   t = mean q - a mean p

In the plane this equals Umeyama's solution without reflection. Gradients reach the pixels through
the warp; boxes and landmarks carry none. Coordinates are pixels, with integers at the pixel
centres.

Source of the template and procedure: insightface `face_align.py`; Umeyama, TPAMI 1991.
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from checkpoints_convert import faces as tables
from checkpoints_convert import rules, store
from jax_idgrpo.config import RewardConfig, photographs_folder
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.bundled_detector import Detections, Detector, DetectorConfig
from jax_idgrpo.models.faces.bundled_judge import Judge, JudgeConfig
from jax_idgrpo.rewards.turns import AVERAGE_HEAD, YawCalibration

Points = tables.Points
ARCFACE_TEMPLATE: Points = tables.ARCFACE_TEMPLATE


@struct.dataclass
class Faces:
    """The faces of videos, best first in each frame, padded to K.

    Attributes:
      boxes: x0 y0 x1 y1 in pixels.
      landmarks: x, y of both eyes, nose, both mouth corners, left in the picture first, in pixels.
      scores: scores of the detector, in [0, 1].
      mask: False on padding.
      embeddings: unit vectors, zero on padding.
    """

    boxes: Float[Array, "B T K 4"]
    landmarks: Float[Array, "B T K 5 2"]
    scores: Float[Array, "B T K"]
    mask: Bool[Array, "B T K"]
    embeddings: Float[Array, "B T K E"]


class HasInputSize(Protocol):
    """Configuration of an embedder: `input_size` is the side of its crops in pixels."""

    input_size: int


@runtime_checkable
class FaceDetector(Protocol):
    """A network that finds faces in pictures."""

    def find(self, pictures: Float[Array, "B H W 3"], faces: int, threshold: float) -> Detections:
        """Find the best faces of each picture.

        Args:
          pictures: values in [-1, 1].
          faces: K, number of faces to return; missing ones are masked.
          threshold: minimum score, in [0, 1].
        """
        ...


@runtime_checkable
class FaceEmbedder(Protocol):
    """A network that embeds aligned crops [N, S, S, 3] with values in [-1, 1], as [N, E]."""

    config: HasInputSize

    def __call__(self, crops: Float[Array, "N S S 3"]) -> Float[Array, "N E"]: ...


def similarity(
    points: Float[Array, "*n 5 2"], template: Float[Array, "5 2"]
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    """Fit the least-squares similarity from points to the template.

    Returns:
      Real and imaginary part of a, and the translation t.
    """
    mean_p, mean_q = jnp.mean(points, -2, keepdims=True), jnp.mean(template, -2, keepdims=True)
    p, q = points - mean_p, template - mean_q
    power = jnp.maximum(jnp.sum(p * p, (-2, -1)), 1e-6)
    real = jnp.sum(p * q, (-2, -1)) / power
    imaginary = jnp.sum(p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0], -1) / power
    a = jnp.stack([real, imaginary], -1)
    return a, (mean_q - multiply(a[..., None, :], mean_p))[..., 0, :]


def multiply(a: Float[Array, "*n 2"], b: Float[Array, "*m 2"]) -> Float[Array, "*k 2"]:
    """Multiply complex numbers stored as (real, imaginary)."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    return jnp.stack([real, a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]], -1)


def warp(picture: Float[Array, "H W 3"], places: Float[Array, "*n 2"]) -> Float[Array, "*n 3"]:
    """Sample a picture in [-1, 1] bilinearly at x, y in pixels; black outside."""
    height, width = picture.shape[:2]
    corner = jnp.floor(places)
    share = places - corner
    flat = picture.reshape(-1, 3) + 1.0
    out = jnp.zeros((*places.shape[:-1], 3), picture.dtype)
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            weight = jnp.abs(1 - dx - share[..., 0]) * jnp.abs(1 - dy - share[..., 1])
            weight = weight * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
            index = jnp.clip(y, 0, height - 1).astype(jnp.int32) * width + jnp.clip(
                x, 0, width - 1
            ).astype(jnp.int32)
            out = out + weight[..., None] * flat[index]
    return out - 1.0


def align(
    pictures: Float[Array, "B H W 3"],
    landmarks: Float[Array, "B K 5 2"],
    template: Points,
    size: int,
) -> Float[Array, "B K {size} {size} 3"]:
    """Warp faces to crops in which the landmarks coincide with the template.

    Args:
      pictures: values in [-1, 1].
      landmarks: x, y in pixels of the pictures; K faces each.
      template: x, y of the landmarks in pixels of the crop.
      size: side of the crop in pixels.
    """
    a, t = similarity(jax.lax.stop_gradient(landmarks), jnp.asarray(template))
    inverse = a * jnp.array([1.0, -1.0]) / jnp.maximum(jnp.sum(a * a, -1, keepdims=True), 1e-6)
    x, y = jnp.meshgrid(jnp.arange(size, dtype=jnp.float32), jnp.arange(size, dtype=jnp.float32))
    grid = jnp.stack([x, y], -1)
    places = multiply(inverse[..., None, None, :], grid - t[..., None, None, :])
    return jax.vmap(warp)(pictures, places)


def normalise(embeddings: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
    """Scale embeddings to unit vectors, with a finite gradient at zero."""
    return embeddings * jax.lax.rsqrt(jnp.sum(embeddings * embeddings, -1, keepdims=True) + 1e-12)


class FaceStack(nnx.Module):
    """Detect, align and embed faces as one function of the pixels."""

    def __init__(
        self,
        detector: FaceDetector,
        embedder: FaceEmbedder,
        template: Points,
        max_faces: int,
        threshold: float,
        yaw: YawCalibration | None = None,
    ):
        """Assemble the networks.

        Args:
          detector: finds boxes and landmarks.
          embedder: embeds aligned crops.
          template: x, y of the landmarks in pixels of the embedder's crop.
          max_faces: K, faces per frame.
          threshold: minimum detector score, in [0, 1].
          yaw: constants of the yaw for the detector's landmarks; None if they do not show it.
        """
        self.detector = detector
        self.embedder = embedder
        self.template = template
        self.max_faces = max_faces
        self.threshold = threshold
        self.yaw = yaw

    def __call__(self, videos: Float[Array, "B T H W 3"]) -> Faces:
        """Find the faces of videos in [-1, 1].

        The small detector needs H and W to be multiples of 4. Frames are processed one after the
        other, each for all videos, so that memory holds the maps and crops of one frame only.
        """
        videos = videos.astype(jnp.float32)

        def one(frame: Int[Array, ""]) -> Faces:
            pictures = jax.lax.dynamic_index_in_dim(videos, frame, axis=1, keepdims=False)
            searched = jax.lax.stop_gradient(pictures)
            found = self.detector.find(searched, self.max_faces, self.threshold)
            embeddings = self._embedded(pictures, found.landmarks, found.mask)
            return Faces(found.boxes, found.landmarks, found.scores, found.mask, embeddings)

        faces = jax.lax.map(one, jnp.arange(videos.shape[1]))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), faces)

    def embed(
        self,
        videos: Float[Array, "B T H W 3"],
        landmarks: Float[Array, "B T K 5 2"],
        mask: Bool[Array, "B T K"],
    ) -> Float[Array, "B T K E"]:
        """Embed faces that another stack found, frame by frame.

        Args:
          videos: values in [-1, 1].
          landmarks: x, y of the faces' landmarks in pixels.
          mask: False on padding.

        Returns:
          Unit vectors, zero on padding.
        """
        videos = videos.astype(jnp.float32)

        def one(frame: Int[Array, ""]) -> Float[Array, "B K E"]:
            pictures, points, shown = (
                jax.lax.dynamic_index_in_dim(leaf, frame, axis=1, keepdims=False)
                for leaf in (videos, landmarks, mask)
            )
            return self._embedded(pictures, points, shown)

        return jnp.moveaxis(jax.lax.map(one, jnp.arange(videos.shape[1])), 0, 1)

    def _embedded(
        self,
        pictures: Float[Array, "B H W 3"],
        landmarks: Float[Array, "B K 5 2"],
        mask: Bool[Array, "B K"],
    ) -> Float[Array, "B K E"]:
        """Embed the first face of all pictures, then the second, as long as a picture has one.

        Args:
          pictures: in [-1, 1].
          landmarks: of the faces, x, y in pixels.
          mask: False on padding.

        Returns:
          Unit vectors, zero on padding.
        """
        config = self.embedder.config

        def embed(places: Float[Array, "B 5 2"]) -> Float[Array, "B E"]:
            crops = align(pictures, places[:, None], self.template, config.input_size)
            return normalise(self.embedder(crops[:, 0]))

        def one(face: tuple[Array, Array]) -> Float[Array, "B E"]:
            places, shown = face
            nothing = jax.eval_shape(embed, places)
            found = jax.lax.cond(
                jnp.any(shown), embed, lambda _: jnp.zeros(nothing.shape, nothing.dtype), places
            )
            return found * shown[:, None]

        return jnp.moveaxis(
            jax.lax.map(one, (jnp.moveaxis(landmarks, 1, 0), jnp.moveaxis(mask, 1, 0))), 0, 1
        )

    def best(
        self, pictures: Float[Array, "B h w 3"]
    ) -> tuple[Float[Array, "B E"], Bool[Array, " B"], Float[Array, "B 5 2"]]:
        """Find the best face of each picture: its embedding, whether it exists, its landmarks."""
        # As frames of one video, so that photos are searched one by one.
        faces = self(pictures[None])
        return faces.embeddings[0, :, 0], faces.mask[0, :, 0], faces.landmarks[0, :, 0]


# ---- stored networks: NAME.safetensors beside NAME.json, which describes the network -------------

_KINDS: dict[str, tuple[type[nnx.Module], type]] = {
    "detector": (Detector, DetectorConfig),
    "judge": (Judge, JudgeConfig),
    **{name: (entry.network, entry.config) for name, entry in tables.NETWORKS.items()},
}


def save_network(network: nnx.Module, path: Path, **values: object) -> None:
    """Write `path`.safetensors and `path`.json.

    Args:
      network: the network to store.
      path: path of both files without suffix.
      **values: further entries of the JSON, beside architecture and configuration.
    """
    kind = next(name for name, (cls, _) in _KINDS.items() if type(network) is cls)
    state = nnx.state(network)
    store.write_file(
        path.with_suffix(".safetensors"),
        rules.to_torch(tables.table(kind, network.config, state), state),
    )
    store.write_json(
        path.with_suffix(".json"),
        {"architecture": kind, "config": dataclasses.asdict(network.config), **values},
    )


def _read_values(path: Path) -> dict[str, Any]:
    """Read the JSON of a network.

    Raises:
      UserError: the file is missing. For missing networks for photographs the message gives the
        command that makes them.
    """
    path = path.with_suffix(".json")
    if path.parent == photographs_folder() and not path.is_file():
        raise UserError(
            f"reward.faces photographs: {path.parent} has no {path.name} yet; run idgrpo-convert faces {path.parent} --photographs"
        )
    return store.read_json(path)


def load_network(path: Path) -> tuple[nnx.Module, dict[str, Any]]:
    """Read the files of `save_network`.

    Returns:
      The network and the values of its JSON.

    Raises:
      UserError: a file is missing, damaged, or holds another network.
    """
    values = _read_values(path)
    if values.get("architecture") not in _KINDS:
        raise UserError(
            f"{path.with_suffix('.json')}: architecture is {values.get('architecture')!r}; use one of {', '.join(_KINDS)}"
        )
    kind = values["architecture"]
    network, schema = _KINDS[kind]
    try:
        config = tables.config_from_json(schema, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path.with_suffix('.json')}: config does not describe a {kind} ({error}); get the file again"
        ) from None
    graph, abstract = nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    tensors = tables.without_counters(store.open_tensors(path.with_suffix(".safetensors")))
    state = rules.to_jax(
        tables.table(kind, config, abstract),
        tensors,
        abstract,
        str(path.with_suffix(".safetensors")),
    )
    return nnx.merge(graph, state), values


def load_stack(folder: Path, embedder: str) -> FaceStack:
    """Load the face stack of a folder: its `detector` and an embedder ("embedder" or "judge").

    Raises:
      UserError: a file is missing or damaged.
    """
    detector, settings = load_network(Path(folder) / "detector")
    return FaceStack(
        detector,
        *load_embedder(folder, embedder),
        settings["max_faces"],
        settings["threshold"],
        _yaw(detector, settings),
    )


def _yaw(detector: nnx.Module, settings: dict[str, Any]) -> YawCalibration | None:
    """Return the constants of the yaw. The bundled detector has those that were fitted, if any."""
    if not isinstance(detector, Detector):
        return AVERAGE_HEAD
    fitted = settings.get("yaw")
    return None if fitted is None else YawCalibration(a=fitted["a"], b=fitted["b"])


def load_embedder(folder: Path, name: str) -> tuple[FaceEmbedder, Points]:
    """Load an embedder of a folder, and the positions of the landmarks in its crops.

    Raises:
      UserError: a file is missing or damaged.
    """
    network, values = load_network(Path(folder) / name)
    return network, tuple((float(x), float(y)) for x, y in values["template"])


def load_architecture(folder: Path, name: str) -> str:
    """Read the architecture of a network of a folder, such as "sface" of its "embedder".

    Raises:
      UserError: its JSON file is missing or damaged.
    """
    return str(_read_values(Path(folder) / name).get("architecture"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Cosines of an embedder, as in `RewardConfig`.

    The defaults apply to networks stored without them, and to deepface's models.

    Attributes:
      similarity_low: cosine with score 0.
      similarity_high: cosine with score 1.
      missing: minimum cosine for a match.
    """

    similarity_low: float = 0.0
    similarity_high: float = 0.9
    missing: float = 0.15


def load_settings(folder: Path, name: str) -> Settings:
    """Read the cosines of the embedder `name` of a folder.

    Raises:
      UserError: its JSON file is missing or damaged, or a value is not a number.
    """
    path = Path(folder) / f"{name}.json"
    stored = _read_values(path)
    names = [field.name for field in dataclasses.fields(Settings)]
    for field in names:
        value = stored.get(field, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {field} is {value!r}; use a number")
    return Settings(**{field: float(stored[field]) for field in names if field in stored})


def reward_settings(config: RewardConfig) -> Settings:
    """Return the cosines of the configuration, with missing ones from the embedder.

    Raises:
      UserError: the embedder's JSON file is missing or damaged, or the cosines are in the wrong
        order.
    """
    chosen = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    if None in chosen.values():
        stored = load_settings(config.folder(), "embedder") if config.reads_faces else Settings()
        chosen |= {name: getattr(stored, name) for name, value in chosen.items() if value is None}
    settings = Settings(**chosen)
    if settings.similarity_low >= settings.similarity_high:
        raise UserError(
            f"reward.similarity_low {settings.similarity_low} is not below similarity_high {settings.similarity_high}"
        )
    return settings
