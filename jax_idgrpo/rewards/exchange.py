"""Define the format in which videos go to a reward server and scores come back.

A request is one JSON object with an entry per video in each list:

    videos       base64 of a file: npy, npy in gzip, MP4 or another container that is read
    prompts      texts
    references   lists of base64 of image files, the photos of the people in their order

An npy file is [F, H, W, 3], either uint8, or float32 or float16 in [-1, 1]. Our client sends float32,
so that the server sees the same numbers as a reward in the training process, and in gzip where this
saves a fifth. The last bits of most float32 pixels are noise, which does not shrink.

A reply is a JSON list with a number per video, or an object of such lists with the key "reward",
whose other values are further terms. A number that is null or not finite marks a video that could
not be scored. An error is a status of 400 or more, with `{"error": TEXT}` or plain text.

`GET ADDRESS?frames=F` may be answered by `{"frames": [n, ...]}`, the numbers of the frames of a video
of F frames that the reward depends on. The client then sends only these frames.

Nothing in a request or a reply is executed.
"""

import base64
import binascii
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jax_idgrpo.data.video import decode_video, from_uint8
from jax_idgrpo.errors import UserError

MAX_SIDE = 4096  # pixels
MAX_FRAMES = 1024
MAX_PIXELS = 2**28  # of all frames of a video: 3.2 GB as float32
LARGEST = 1.001  # absolute value of a float pixel; low precision rounds 1 up
MAX_TERMS = 100

_TRIED = 2**18  # bytes that are compressed to find out whether it saves space
_NPY, _GZIP = b"\x93NUMPY", b"\x1f\x8b"
_DTYPES = ("uint8", "float16", "float32")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_TERM = re.compile(r"[A-Za-z]\w{0,63}")

Video = Float[np.ndarray, "_ _ _ 3"]  # frames, height, width; videos of a request may differ


class Refused(Exception):
    """A request or a reply that is not in the format, as one line."""


class Request(NamedTuple):
    """A decoded request, with one entry per video in each list.

    Attributes:
      videos: values in [-1, 1].
      prompts: texts.
      references: bytes of the image files of each prompt.
    """

    videos: list[Video]
    prompts: list[str]
    references: list[list[bytes]]


def one_line(text: str, most: int = 160) -> str:
    """Return the beginning of a text as one line of printable characters."""
    words = " ".join(text[: 4 * most].split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in words)
    return shown if len(shown) <= most else f"{shown[:most]}..."


# ---- requests ------------------------------------------------------------------------------------


def encode_request(
    videos: Sequence[Video], prompts: Sequence[str], references: Sequence[Sequence[bytes]]
) -> bytes:
    """Encode videos as float32 npy, without loss.

    Args:
      videos: values in [-1, 1].
      prompts: a text per video.
      references: bytes of the image files of each prompt.
    """
    return json.dumps(
        {
            "videos": [_text(_packed(_npy(video))) for video in videos],
            "prompts": list(prompts),
            "references": [[_text(photo) for photo in photos] for photos in references],
        }
    ).encode()


def _npy(video: Video) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(video, np.float32), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def _packed(content: bytes) -> bytes:
    """Compress a file if its beginning shows that this is worth the time."""
    start = content[:_TRIED]
    worth = len(gzip.compress(start, 1, mtime=0)) < 0.8 * len(start)
    return gzip.compress(content, 1, mtime=0) if worth else content


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def decode_request(body: bytes) -> Request:
    """Decode and check a request.

    Raises:
      Refused: the body is not in the format, or a video is empty, too large or out of range.
    """
    found = _json(body, "the request")
    if not isinstance(found, dict):
        raise Refused("the request is no JSON object; send videos, prompts and references")
    lists: dict[str, list] = {}
    for name in Request._fields:
        lists[name] = found.get(name, [[]] * len(lists.get("prompts", [])))
        if not isinstance(lists[name], list):
            raise Refused(f"{name} is no list; send one entry per video")
    counts = {name: len(entries) for name, entries in lists.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise Refused(f"the request has {told}; send one of each per video")
    for number, text in enumerate(lists["prompts"]):
        if not isinstance(text, str):
            raise Refused(f"prompt {number} is no text")
    photos = [
        [
            _bytes(photo, f"photo {m} of video {number}")
            for m, photo in enumerate(_list(row, f"references {number}"))
        ]
        for number, row in enumerate(lists["references"])
    ]
    videos = within_limits(
        decode_pixels(_bytes(video, f"video {number}"), f"{number} of the request")
        for number, video in enumerate(lists["videos"])
    )
    return Request(videos, lists["prompts"], photos)


def within_limits(videos: Iterable[Video]) -> list[Video]:
    """Collect the videos of a request.

    Raises:
      Refused: together they have more pixels than the largest video may have.
    """
    found: list[Video] = []
    pixels = 0
    for video in videos:
        pixels += math.prod(video.shape[:3])
        if pixels > MAX_PIXELS:
            raise Refused(f"the request has over {MAX_PIXELS} pixels; send fewer videos at once")
        found.append(video)
    return found


def decode_pixels(content: bytes, name: str) -> Video:
    """Decode a video in any of the formats that a request may hold.

    Args:
      content: bytes of an npy file, such a file in gzip, or a video file.
      name: name of the video, for messages.

    Raises:
      Refused: the content is none of these, or is empty, too large or out of range.
    """
    if content.startswith(_GZIP):
        content = _unpacked(content, name)
    if not content.startswith(_NPY):
        try:
            pixels = decode_video(content, name, MAX_PIXELS)
        except UserError as error:
            raise Refused(str(error)) from None
        check_size(pixels.shape, name)
        return from_uint8(pixels)
    pixels = _array(content, name)
    if pixels.dtype == np.uint8:
        return from_uint8(pixels)
    if not np.isfinite(pixels).all():
        raise Refused(f"video {name}: is not finite (NaN or infinity)")
    if np.abs(pixels).max() > LARGEST:
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise Refused(f"video {name}: has values {span}; send floats in [-1, 1], or uint8")
    return pixels.astype(np.float32)


def _unpacked(content: bytes, name: str) -> bytes:
    """Decompress gzip up to the size of the largest video."""
    most = 4 * 3 * MAX_PIXELS + 1024
    reader = zlib.decompressobj(wbits=31)
    try:
        found = reader.decompress(content, most)
    except zlib.error as error:
        raise Refused(f"video {name}: is no intact gzip file ({error})") from None
    if not reader.eof:
        reason = "is too large" if len(found) == most else "is cut off"
        raise Refused(f"video {name}: {reason}")
    return found


def _array(content: bytes, name: str) -> np.ndarray:
    """Read an npy file whose size matches its header; objects are refused."""
    file = io.BytesIO(content)
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError) as error:
        raise Refused(
            f"video {name}: is no npy file that is read ({one_line(str(error))})"
        ) from None
    if dtype.name not in _DTYPES:
        raise Refused(f"video {name}: has dtype {dtype.name}; send {', '.join(_DTYPES)}")
    check_size(shape, name)
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise Refused(f"video {name}: has another size than its header says; send it again")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def check_size(shape: tuple[int, ...], name: str) -> None:
    """Check the shape of a video; `name` is for messages.

    Raises:
      Refused: it is not [F, H, W, 3], is empty, or is too large.
    """
    if len(shape) != 4 or shape[3] != 3:
        raise Refused(f"video {name}: has shape {list(shape)}; send [frames, height, width, 3]")
    frames, height, width = shape[:3]
    if not (1 <= frames <= MAX_FRAMES and min(height, width) >= 1):
        raise Refused(f"video {name}: has {frames} frames of {height} x {width} pixels")
    if max(height, width) > MAX_SIDE or frames * height * width > MAX_PIXELS:
        raise Refused(
            f"video {name}: has {frames} frames of {height} x {width} pixels; a side may have "
            f"{MAX_SIDE}, all frames together {MAX_PIXELS}"
        )


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise Refused(f"{what}: no list")
    return value


def _bytes(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise Refused(f"{what}: no base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{what}: no base64 text ({error})") from None


def _json(body: bytes, what: str) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        start = one_line(body[:240].decode("utf-8", "replace"), 60)
        raise Refused(f"{what} is no JSON but {len(body)} bytes: {start}") from None


# ---- replies -------------------------------------------------------------------------------------


def encode_reply(terms: Mapping[str, Sequence[float]]) -> bytes:
    """Encode terms by name; numbers that are not finite become null."""
    return json.dumps(
        {
            name: [value if math.isfinite(value) else None for value in map(float, values)]
            for name, values in terms.items()
        }
    ).encode()


def decode_reply(body: bytes, count: int) -> dict[str, list[float]]:
    """Decode and check the terms of `count` videos; numbers that are null become NaN.

    Raises:
      Refused: the body is not in the format.
    """
    found = _json(body, "the reply")
    named = {"reward": found} if isinstance(found, list) else found
    if not isinstance(named, dict) or "reward" not in named:
        keys = ", ".join(named) if isinstance(named, dict) else type(named).__name__
        raise Refused(f'the reply has no "reward" but {one_line(keys, 60) or "nothing"}')
    if len(named) > MAX_TERMS:
        raise Refused(f"the reply has {len(named)} terms; {MAX_TERMS} are read")
    terms = {}
    for name, values in named.items():
        if not _TERM.fullmatch(name) or name == "step":
            raise Refused(f"a term of the reply is called {one_line(name, 60)!r}")
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise Refused(f"{name} of the reply is no list of numbers")
        if len(values) != count:
            raise Refused(f"{name} of the reply has {len(values)} numbers for {count} videos")
        terms[name] = [math.nan if value is None else float(value) for value in values]
    return terms


def _is_number(value: object) -> bool:
    """Return whether a JSON value is null or a number that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1000
    return value is None or isinstance(value, float)


def encode_frames(numbers: np.ndarray | None) -> bytes:
    """Encode the numbers of the frames that a reward depends on; None means all."""
    return json.dumps({"frames": None if numbers is None else numbers.tolist()}).encode()


def decode_frames(body: bytes, total: int) -> np.ndarray | None:
    """Decode the numbers of frames; None for all, also if the body announces none.

    Args:
      body: the reply.
      total: number of frames of the video.
    """
    try:
        found = _json(body, "the reply")
    except Refused:
        return None
    numbers = found.get("frames") if isinstance(found, dict) else None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return None
    ascending = all(a < b for a, b in itertools.pairwise(numbers))
    if not numbers or not ascending or numbers[0] < 0 or numbers[-1] >= total:
        return None
    return np.asarray(numbers)


def error_of(body: bytes) -> str:
    """Return the reason of an error reply as one line."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        found = json.loads(body)
        text = found["error"] if isinstance(found["error"], str) else text
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    return one_line(text)
