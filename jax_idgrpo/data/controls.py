"""Read the control videos and masks that the columns `control` and `mask` of a prompts CSV name.

They are inputs of VACE: a pose, depth or layout video to follow, or a video of which only the white
part of a mask is generated. `control` is a video file. `mask` is a video or a picture, white where
the video is generated; without it everything is. Frames are sampled at the frame rate of the run,
scaled to cover its size and cropped about the middle. A shorter video holds its last frame.
Source: diffusers' `WanVACEPipeline`.
"""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.video import Clip, from_uint8, read_frames
from jax_idgrpo.errors import UserError

COLUMNS = ("control", "mask")
PICTURES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_controls(row: dict, folder: Path) -> tuple[Path | None, Path | None]:
    """Find the control video and the mask that a row of a CSV names, and check that they are read.

    Args:
      row: fields of the row by name.
      folder: folder of the CSV.

    Raises:
      UserError: a file is missing or is no video, or there is a mask without a control video or of
        another length.
    """
    found: list[Path | None] = []
    frames: list[int] = []
    for name in COLUMNS:
        text = (row.get(name) or "").strip()
        path = folder / Path(text).expanduser() if text else None
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: no such file; {name} is relative to the CSV")
        if path is not None and not (name == "mask" and path.suffix.lower() in PICTURES):
            try:
                frames.append(len(Clip.open(path).numbers))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        elif path is not None:
            load_reference(path)
        found.append(path)
    control, mask = found
    if mask is not None and control is None:
        raise UserError("mask without control; name the video whose white part is to be generated")
    if len(set(frames)) > 1:
        raise UserError(
            f"mask {mask} has {frames[1]} frames and its control video {frames[0]}; make them equally "
            "long, or use a picture"
        )
    return control, mask


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_control(
    control: Path, mask: Path | None, frames: int, size: tuple[int, int], fps: int
) -> tuple[Float[np.ndarray, "F H W 3"], Float[np.ndarray, "F H W"]]:
    """Read a control video in [-1, 1], and its mask in [0, 1], 1 where the video is generated.

    Args:
      control: the video.
      mask: a video or a picture; None generates everything.
      frames: F, number of frames.
      size: height and width in pixels.
      fps: frames per second.

    Raises:
      UserError: a file cannot be read.
    """
    video = _held(read_frames(control, frames, size, fps), frames)
    if mask is None:
        return video, np.ones((frames, *size), np.float32)
    if mask.suffix.lower() in PICTURES:
        fitted = ImageOps.fit(load_reference(mask), size[::-1], Image.Resampling.LANCZOS)
        shown = from_uint8(np.asarray(fitted))[None]
    else:
        shown = read_frames(mask, frames, size, fps)
    return video, np.clip((_held(shown, frames)[..., 0] + 1) / 2, 0, 1)


def _held(video: Float[np.ndarray, "n H W 3"], frames: int) -> Float[np.ndarray, "{frames} H W 3"]:
    """Repeat the last frame of a video that is too short."""
    return np.concatenate([video, np.repeat(video[-1:], frames - len(video), axis=0)])
