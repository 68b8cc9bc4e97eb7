"""Encode clips, photos and texts once, and keep the results in files named by their content.

An array of the cache is a float16 `.npy` file. Its name is a hash of everything that it depends on:
the bytes of the video or photo, the size, the network that encodes it, and the way in which it is
prepared. Changed content therefore has another name and is encoded again. Training steps only read
files.

    clip    [W, T, h, w, C]   W windows of `video.frames` frames; 0 if the clip is too short
    photo   [V, h, w, C]      V variants of one photo (`photo_variants`)
    text    [n, D]            embedding without padding
    places  [W, T, h, w, C]   drawn boxes of the people in the windows of a clip
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from jax_idgrpo import flow
from jax_idgrpo.config import Config, VideoConfig
from jax_idgrpo.data.controls import file_digest
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.places import Places, draw_places
from jax_idgrpo.data.video import File, read_frames
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.journal import decided
from jax_idgrpo.metrics import progress
from jax_idgrpo.parallel.hosts import run_once, to_host
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.pipeline import Pipeline

WINDOWS = 4  # windows of a long clip that are encoded, within its first WINDOWS * frames frames
VARIANTS = 4  # variants of a photo that is augmented
LIGHT = 0.2  # largest relative change of brightness and contrast
FACE_SHARE = (0.3, 0.7)  # height of the face in a cropped photo, as a share of the crop's

FindFace = Callable[[Float[np.ndarray, "H W 3"]], Float[np.ndarray, "4"] | None]
"""Maps a photo on its canvas to the box of its face in pixels; None if it shows no face."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of the cache: its name, and the function that computes it (collective)."""

    name: str
    make: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Latents:
    """Folder of the encoded arrays."""

    folder: Path

    def fill(self, entries: Iterable[Entry]) -> None:
        """Compute the missing arrays, with a progress bar (collective).

        Raises:
          UserError: a file cannot be read, or the folder cannot be written.
        """
        wanted = list({entry.name: entry for entry in entries}.values())
        missing = decided(lambda: [entry.name for entry in wanted if not self._has(entry.name)])
        if not missing:
            return
        absent = set(missing)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache {self.folder}: cannot be written ({error.strerror}); name another folder in "
                "finetune.options cache"
            ) from None
        with progress("encoding clips, photos and texts", len(absent)) as update:
            for done, entry in enumerate((e for e in wanted if e.name in absent), 1):
                run_once(self._write, entry.name, entry.make().astype(np.float16))
                update(done)
        decided(lambda: True)  # the other processes read the files only after they are written

    def read(self, name: str) -> np.ndarray:
        """Open an array without reading it whole."""
        return np.load(self._path(name), mmap_mode="r", allow_pickle=False)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _has(self, name: str) -> bool:
        """Return whether a file exists and has a whole header and all its bytes."""
        try:
            self.read(name)
        except (OSError, ValueError):
            return False
        return True

    def _write(self, name: str, array: np.ndarray) -> None:
        aside = self.folder / f".{name}.{os.getpid()}.npy"
        np.save(aside, array, allow_pickle=False)
        aside.replace(self._path(name))


def content_hash(file: File) -> str:
    """Hash the bytes of a file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        if not isinstance(file, Path):
            return hashlib.sha256(file.read_bytes()).hexdigest()
        return file_digest(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its path") from None


def name_of(*parts: object) -> str:
    """Name an array by everything that it depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes the entries of clips, photos and texts for one pipeline and video size.

    Attributes:
      pipe: supplies VAE, text encoder and tokenizer.
      config: of the run.
      vae: fingerprint of the VAE.
      text_encoder: fingerprint of the text encoder.
    """

    pipe: Pipeline
    config: Config
    vae: str
    text_encoder: str

    @classmethod
    def make(cls, pipe: Pipeline, config: Config) -> "Encoder":
        """Make the encoder of a pipeline (collective)."""
        networks = (nnx.state(pipe.vae), nnx.state(pipe.text_encoder))
        return cls(pipe, config, *map(network_hash, networks))

    def clip(self, path: Path) -> Entry:
        """Describe the windows of a clip."""
        video = self.config.video

        def make() -> np.ndarray:
            windows = clip_windows(path, video)
            shape = (flow.latent_frames(video.frames), video.height // 8, video.width // 8)
            found = [self._encode(window[None])[0] for window in windows]
            return np.stack(found) if found else np.zeros((0, *shape, self.pipe.vae.config.z_dim))

        return Entry(name_of("clip", content_hash(path), self.vae, video, WINDOWS), make)

    def photo(self, file: File, own: bool, find_face: FindFace | None, faces: str) -> Entry:
        """Describe the variants of a photo.

        Args:
          file: the photo.
          own: whether it was cut from the clip that it is the reference of.
          find_face: finds the face for the crops; None makes no crops.
          faces: fingerprint of the networks of `find_face`.
        """
        video, kind = self.config.video, self.config.model.kind
        digest = content_hash(file)
        whole = conditioning.canvas if kind == "vace" else conditioning.whole_canvas

        def fit(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
            return whole(image, video.height, video.width)

        def make() -> np.ndarray:
            image = load_reference(file)
            box = None
            if find_face is not None:
                found = find_face(conditioning.canvas(image, video.height, video.width))
                box = None if found is None else in_image(found, image.size, video)
            variants = photo_variants(image, int(digest[:16], 16), box, find_face is not None, own)
            return np.stack([self._encode(fit(image)[None, None])[0, 0] for image in variants])

        augmented = (faces, VARIANTS, FACE_SHARE) if find_face is not None else ()
        name = name_of("photo", digest, self.vae, video, kind == "vace", own, augmented)
        return Entry(name, make)

    def text(self, text: str) -> Entry:
        """Describe the embedding of a text."""
        length = self.config.data.text_length

        def make() -> np.ndarray:
            return conditioning.encode_texts(self.pipe, [text], length)[0]

        return Entry(name_of("text", text, self.text_encoder, length), make)

    def places(self, path: Path, places: Places) -> Entry:
        """Describe the drawn boxes of the people in the windows of a clip.

        The boxes move from the first to the last of the frames that are read of the clip.

        Args:
          path: the clip.
          places: with boxes.
        """
        video, coloured = self.config.video, self.config.data.places_colours == "person"
        size = (video.height, video.width)

        def make() -> np.ndarray:
            count = len(read_frames(path, WINDOWS * video.frames, size, video.fps))
            drawn = draw_places(places, count, size, coloured)
            found = [
                self._encode(drawn[None, start : start + video.frames])[0]
                for start in window_starts(count, video.frames)
            ]
            shape = (flow.latent_frames(video.frames), video.height // 8, video.width // 8)
            return np.stack(found) if found else np.zeros((0, *shape, self.pipe.vae.config.z_dim))

        parts = content_hash(path), dataclasses.astuple(places), coloured
        return Entry(name_of("places", *parts, self.vae, video, WINDOWS), make)

    def grey(self) -> Float[np.ndarray, "T h w C"]:
        """Encode a mid-grey video, of which VACE's control is made."""
        video = self.config.video
        return self._encode(np.zeros((1, video.frames, video.height, video.width, 3), np.float32))[
            0
        ]

    def _encode(self, video: Float[np.ndarray, "B F H W 3"]) -> Float[np.ndarray, "B T h w C"]:
        return to_host(conditioning.encode_video(self.pipe.vae, video))


def network_hash(state: PyTree) -> str:
    """Hash the arrays of a network, one at a time (collective)."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(to_host(leaf)).tobytes())
    return digest.hexdigest()


# ---- clips ---------------------------------------------------------------------------------------


def clip_windows(path: Path, video: VideoConfig) -> Float[np.ndarray, "windows F H W 3"]:
    """Read up to `WINDOWS` evenly spaced windows of a clip; none if the clip is too short.

    Raises:
      UserError: the video cannot be read.
    """
    size = (video.height, video.width)
    frames = read_frames(path, WINDOWS * video.frames, size, video.fps)
    starts = window_starts(len(frames), video.frames)
    if not starts:
        return np.zeros((0, video.frames, *size, 3), np.float32)
    return np.stack([frames[start : start + video.frames] for start in starts])


def window_starts(total: int, frames: int) -> list[int]:
    """Return the first frames of up to `WINDOWS` evenly spaced windows; none if there are too few.

    Args:
      total: number of frames of the clip.
      frames: number of frames of a window.
    """
    room = total - frames
    if room < 0:
        return []
    return np.unique(np.linspace(0, room, min(WINDOWS, room + 1)).round().astype(int)).tolist()


# ---- photos --------------------------------------------------------------------------------------


def in_image(
    box: Float[np.ndarray, "4"], size: tuple[int, int], video: VideoConfig
) -> Float[np.ndarray, "4"]:
    """Map a box on the canvas of a photo back to the pixels of the photo.

    Args:
      box: x0 y0 x1 y1 on the canvas.
      size: width and height of the photo.
      video: its size is that of the canvas.
    """
    scale = min(video.width / size[0], video.height / size[1])
    left, top = (
        (whole - side * scale) / 2 for whole, side in zip((video.width, video.height), size)
    )
    return (box - np.array([left, top, left, top])) / scale


def photo_variants(
    image: Image.Image,
    seed: int,
    face: Float[np.ndarray, "4"] | None,
    augment: bool,
    own: bool,
) -> list[Image.Image]:
    """Make the variants of a photo of which a training step draws one.

    With `augment`: the photo as it is, cropped about the face, and both again with the background
    outside the person's outline in white, as on VACE's canvas. A photo without a face is not
    changed. A photo cut from the clip itself is mirrored and its light is changed, so that copying
    its pixels does not reduce the loss.

    Args:
      image: upright RGB.
      seed: seed of the variants, from the content of the photo.
      face: box of the face in pixels.
      augment: whether the photo is cropped and its background removed.
      own: whether the photo was cut from the clip itself.
    """
    random = np.random.default_rng(seed)
    variants = [image] * (VARIANTS if augment or own else 1)
    if augment and face is not None:
        blank = on_outline(image, face)
        frame = crop_box(image.size, face, random.uniform(*FACE_SHARE))
        variants = [image, image.crop(frame), blank, blank.crop(frame)]
    return [_relit(variant, random) for variant in variants] if own else variants


def crop_box(
    size: tuple[int, int], face: Float[np.ndarray, "4"], share: float
) -> tuple[int, int, int, int]:
    """Return a square about a face, within the picture.

    Args:
      size: width and height of the picture.
      face: box of the face.
      share: height of the face as a share of the square's side.
    """
    left, top, right, bottom = (float(x) for x in face)
    side = (bottom - top) / share
    # The face is above the middle, so that the shoulders are in the picture.
    x, y = (left + right) / 2, (top + bottom) / 2 + 0.1 * side
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    limits = (size[0], size[1], size[0], size[1])
    x0, y0, x1, y1 = (round(min(max(value, 0), limit)) for value, limit in zip(box, limits))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def on_outline(image: Image.Image, face: Float[np.ndarray, "4"]) -> Image.Image:
    """Replace everything outside an outline of head and shoulders by white.

    Args:
      image: upright RGB.
      face: box of the face.
    """
    left, top, right, bottom = (float(x) for x in face)
    x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    for middle, radius_x, radius_y in (
        (y - 0.1 * height, 0.95 * width, 0.95 * height),  # head with hair
        (y + 2.1 * height, 1.7 * width, 1.7 * height),  # shoulders
    ):
        draw.ellipse((x - radius_x, middle - radius_y, x + radius_x, middle + radius_y), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(height / 30))
    return Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), mask)


def _relit(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Mirror a photo, and change its brightness and contrast."""
    bright, contrast = (1 + LIGHT * random.uniform(-1, 1, 2)).tolist()
    mirrored = ImageEnhance.Brightness(ImageOps.mirror(image)).enhance(bright)
    return ImageEnhance.Contrast(mirrored).enhance(contrast)


def stacked(photos: Sequence[np.ndarray], count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Stack latents of photos as float32, padded with zeros to `count`.

    Args:
      photos: at most `count` arrays.
      count: length of the result.
      shape: of one photo's latents.
    """
    out = np.zeros((count, *shape), np.float32)
    for number, photo in enumerate(photos):
        out[number] = photo
    return out
