"""Read reference photos as upright RGB, and explain unreadable ones.

A photo is any picture that Pillow decodes itself, and HEIC where the package pillow-heif is
installed. Each side has at least `SMALLEST` pixels; the total is at most what Pillow reads safely.
Transparent parts become white. Grey is scaled to 8 bits:

    8 bits    as stored
    16 bits   white is the largest value of the smallest of 8, 10, 12 or 16 bits that holds the
              brightest pixel
    floats    0 is black, 1 is white; other ranges are refused, as their white is unknown
"""

import contextlib
import functools
import hashlib
import importlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageOps

from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError

PICTURES = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. For EPS, Pillow would run another program."""

SMALLEST = 16  # pixels of the shorter side

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_WHITE = (255, 1023, 4095, 65535)  # the largest values of 8, 10, 12 and 16 bits
_NEARLY_BLACK = 16  # of 255; 12-bit values in 16-bit words stay below

_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)
"""Exceptions that Pillow's readers raise on damaged files."""

# Pillow warns of an attack from half of its limit on, which photos of telephones reach. Photos
# above the limit are refused below.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Checked(NamedTuple):
    """A readable photo.

    Attributes:
      digest: SHA-256 of the file's bytes.
      note: what looks odd about the photo, or "".
    """

    digest: str
    note: str


class Decoded(NamedTuple):
    """A decoded photo.

    Attributes:
      image: upright RGB at the photo's own size.
      note: what looks odd about the photo, or "".
    """

    image: Image.Image
    note: str


@functools.cache
def _formats() -> list[str]:
    """List the formats of `PICTURES` that this installation reads."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in PICTURES if name in Image.OPEN]


def load_reference(file: str | File) -> Image.Image:
    """Read an image file of any mode, size and EXIF orientation as upright RGB.

    Raises:
      UserError: the file is missing, damaged, or not as the module's docstring describes.
    """
    with _opened(file, _content(file)) as image:
        return _upright(image)


def decode_photo(file: str | File) -> Decoded:
    """Read a photo as `load_reference` does, with what `check_photo` notes about it.

    Raises:
      UserError: as `load_reference`.
    """
    with _opened(file, _content(file)) as image:
        image.load()
        note = _note(file, image)
        return Decoded(_upright(image), note)


def check_photo(file: str | File) -> Checked:
    """Decode a photo to check it; the pixels are discarded.

    A JPEG is decoded at an eighth of its size, which still reads all of its bytes.

    Raises:
      UserError: as `load_reference`.
    """
    content = _content(file)
    with _opened(file, content) as image:
        if image.format == "JPEG":
            image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
        image.load()
        if image.mode == "F":
            on_white(image)
        note = _note(file, image)
    return Checked(hashlib.sha256(content).hexdigest(), note)


def identify_photo(file: str | File) -> Checked:
    """Check the format, the size and the end of a photo without decoding it; nothing is noted.

    A photo that seems to be cut off is decoded to make sure.

    Raises:
      UserError: the file is missing, is no photo, is too small or too large, or is cut off. Damage
        within the file is not noticed.
    """
    content = _content(file)
    with _opened(file, content):
        if _seems_whole(content):
            return Checked(hashlib.sha256(content).hexdigest(), "")
    return check_photo(file)


def _seems_whole(content: bytes) -> bool:
    """Return whether a JPEG, PNG or WebP has its end; True for other formats.

    A JPEG with other data after its end may seem to be cut off.
    """
    if content.startswith(b"\xff\xd8"):  # the end of the image follows the last start of a scan
        return content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    if content.startswith(b"\x89PNG"):
        return b"IEND" in content
    if content.startswith(b"RIFF"):
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return True


def _upright(image: Image.Image) -> Image.Image:
    """Turn an opened photo, which is changed, and convert it to RGB; the pixels are copied once."""
    ImageOps.exif_transpose(image, in_place=True)
    return on_white(image)


def _note(file: str | File, image: Image.Image) -> str:
    """Describe what looks odd about a decoded photo as stored; "" if nothing does."""
    if image.mode.startswith("I"):
        brightest, white = (values := np.asarray(image)).max(), _white(values)
        if white < _WHITE[-1]:
            return (
                f"image {file}: holds {white.bit_length()} bits in 16-bit words, up to "
                f"{brightest}; {white} is white"
            )
    elif (
        image.mode in ("L", "LA", "RGB", "RGBA")
        and (brightest := _brightest(image)) < _NEARLY_BLACK
    ):
        return (
            f"image {file}: is nearly black ({brightest} of 255); store 12-bit colours with 8 bits"
        )
    return ""


def _content(file: str | File) -> bytes:
    """Read all bytes of a file.

    Raises:
      UserError: the file is missing or cannot be read.
    """
    try:
        return (Path(file) if isinstance(file, str) else file).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"image {file}: no such file; check ref_paths, which are relative to the CSV"
        ) from None
    except IsADirectoryError:
        raise UserError(f"image {file}: is a folder; name the image file in it") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"image {file}: cannot be read ({reason}); check the file and its permissions"
        ) from None


@contextlib.contextmanager
def _opened(file: str | File, content: bytes) -> Iterator[Image.Image]:
    """Open an image; pixels are decoded when they are used, here or in the body of the `with`.

    Args:
      file: the file, for messages.
      content: all bytes of the file.

    Raises:
      UserError: the content cannot be read as a photo, also if the body finds that out.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if min(image.size) < SMALLEST:
                size = f"{image.width} x {image.height}"
                raise UserError(
                    f"image {file}: is {size} pixels; use {SMALLEST} x {SMALLEST} or more"
                )
            yield image
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        millions = f"{int(pixels[0]) // 10**6} megapixels" if pixels else "too many pixels"
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(
            f"image {file}: has {millions}, and up to {limit} are read; make it smaller"
        ) from None
    except Image.UnidentifiedImageError:
        raise UserError(f"image {file}: {_what(content)}") from None
    except _DAMAGED as error:
        raise UserError(
            f"image {file}: cannot be read ({error or type(error).__name__}); "
            "store it again as PNG or JPEG"
        ) from None


def _what(content: bytes) -> str:
    """Describe a file that is no photo by its first bytes, with the remedy."""
    start = content[:1024]
    if not start:
        return "is an empty file; copy it again"
    if start[4:8] == b"ftyp":
        brands = start[8 : max(int.from_bytes(start[:4], "big"), 12)]
        if b"avif" in brands:
            return "is an AVIF photo, which this Pillow does not read; store it as JPEG"
        if brands[:4] in _HEIC_BRANDS:
            if "HEIF" in _formats():
                return "is a HEIC photo that pillow-heif cannot read; store it as JPEG"
            return "is a HEIC photo; pip install pillow-heif to read it, or store it as JPEG"
        return "is a video or a camera's raw file; store a photo as JPEG"
    if start.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "is a JPEG XL photo; store it as JPEG"
    if start.startswith(b"%PDF"):
        return "is a PDF document; store the photo as PNG or JPEG"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; run git lfs pull"
    text = start.lower()
    if b"<svg" in text:
        return "is an SVG drawing; store it as PNG"
    if b"<html" in text or b"<!doctype html" in text:
        return "is a web page; download the photo itself"
    return "cannot be read (not an image); store it again as PNG or JPEG"


def on_white(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as the module's docstring describes.

    Raises:
      ValueError: integers of more than 16 bits, or floats outside [0, 1].
    """
    if image.mode.startswith("I"):
        values = np.asarray(image, np.int64)
        image = Image.fromarray((values * 255 // _white(values)).astype(np.uint8))
    elif image.mode == "F":
        floats = np.asarray(image)
        low, high = floats.min(), floats.max()
        if not (low >= -0.01 and high <= 1.01):
            raise ValueError(f"floats from {low:g} to {high:g}, where black is 0 and white is 1")
        image = Image.fromarray((np.clip(floats, 0.0, 1.0) * 255.0).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _white(values: Int[np.ndarray, "H W"] | np.ndarray) -> int:
    """Return the value of white in a grey image: the largest of the fewest bits that fit it."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _WHITE[-1]:
        raise ValueError(f"grey values from {low} to {high}, more than 16 bits")
    return next(white for white in _WHITE if high <= white)


def _brightest(image: Image.Image) -> int:
    """Return the largest value of the colours, without transparency."""
    bands: Any = image.getextrema()
    if len(image.getbands()) == 1:
        return int(bands[1])
    return max(int(high) for (_, high), name in zip(bands, image.getbands()) if name != "A")
