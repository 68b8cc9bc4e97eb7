"""Process one film: cut it into clips, check them, and store the clips with their people's photos.

The film is decoded four times: to read its times, to measure its frames, to find faces, and to write
the clips that are kept. Each pass holds a few frames. The result is a folder that appears when it is
complete, so an interrupted command repeats at most one film.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jax_idgrpo.data.video import Clip, video_writer
from jax_idgrpo.ingest.faces import ClipReader, FaceLimits, Found
from jax_idgrpo.ingest.frames import Limits, Span, Statistics, spans
from jax_idgrpo.metrics import progress
from jax_idgrpo.workdir import new_folder, write_text

RATE = 4.0  # frames per second in which faces are found
FILE = "film.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the whole command.

    Attributes:
      limits: what a clip must be like.
      faces: what its people must be like.
    """

    limits: Limits
    faces: FaceLimits


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def process(path: Path, out: Path, settings: Settings, reader: ClipReader) -> None:
    """Write the clips and photos of a film, and their description, into a new folder.

    Args:
      path: the film.
      out: the folder.
      settings: options of the command.
      reader: finds faces.

    Raises:
      UserError: the film cannot be read.
    """
    clip = Clip.open(path)
    rate = clip.rate or 24.0
    seconds = len(clip.numbers) / rate
    statistics = Statistics()
    with progress("seconds of film", round(seconds)) as update:
        for number, frame in enumerate(clip.frames()):
            statistics.add(frame)
            if number % round(rate) == 0:
                update(round(number / rate))
    borders = statistics.borders()
    found = spans(statistics, rate, settings.limits)
    people = _find_people(clip, found, rate, borders, settings.faces, reader)
    kept = {number for number, result in people.items() if not result.reason}
    with new_folder(out) as folder:
        rows = [
            _row(number, span, people.get(number), rate, folder)
            for number, span in enumerate(found)
        ]
        spans_kept = [(number, found[number]) for number in sorted(kept)]
        _write_clips(clip, spans_kept, rate, borders, folder)
        description = {"film": path.name, "seconds": seconds, "fps": rate, "clips": rows}
        write_text(folder / FILE, json.dumps(description, indent=1))


def _cropped(
    frame: UInt8[np.ndarray, "H W 3"], borders: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    top, bottom, left, right = borders
    return np.ascontiguousarray(frame[top:bottom, left:right])


def _frames_of(
    clip: Clip, listed: Sequence[tuple[int, Span]]
) -> Iterator[tuple[int, int, UInt8[np.ndarray, "H W 3"]]]:
    """Yield number of the clip, number of the frame and frame, in one pass over the film."""
    waiting = list(listed)
    for number, frame in enumerate(clip.frames()):
        while waiting and number >= waiting[0][1].end:
            waiting.pop(0)
        if not waiting:
            return
        if number >= waiting[0][1].start:
            yield waiting[0][0], number, frame


def _find_people(
    clip: Clip,
    found: Sequence[Span],
    rate: float,
    borders: tuple[int, int, int, int],
    limits: FaceLimits,
    reader: ClipReader,
) -> dict[int, Found]:
    """Find the people of the clips that passed the cheap measures, by number of the clip.

    Args:
      clip: the film.
      found: all clips.
      rate: frames per second.
      borders: picture inside the black borders.
      limits: what the people must be like.
      reader: finds faces.
    """
    listed = [(number, span) for number, span in enumerate(found) if not span.reason]
    people: dict[int, Found] = {}
    size = borders[1] - borders[0], borders[3] - borders[2]
    chosen = {number: set(_sampled(span, rate)) for number, span in listed}
    for number, frame, pixels in _frames_of(clip, listed):
        if frame in chosen[number]:
            reader.add(_cropped(pixels, borders))
            if frame == max(chosen[number]):
                people[number] = reader.finish(limits, size)
    return people


def _sampled(span: Span, rate: float) -> list[int]:
    """Return the frames in which faces are found, `RATE` per second and two at least."""
    count = max(2, round((span.end - span.start) / rate * RATE))
    return np.linspace(span.start, span.end - 1, count).round().astype(int).tolist()


def _row(number: int, span: Span, found: Found | None, rate: float, folder: Path) -> dict[str, Any]:
    """Describe a clip, and write the photos of its people.

    Args:
      number: number of the clip.
      span: its frames and measures.
      found: its people; None if it was left out before.
      rate: frames per second.
      folder: folder of the film.
    """
    row: dict[str, Any] = {
        "number": number,
        "from": round(span.start / rate, 3),
        "to": round(span.end / rate, 3),
        "reason": span.reason or (found.reason if found else ""),
        "value": span.value if span.reason or not found else found.value,
        **{name: round(value, 5) for name, value in span.measures.items()},
    }
    if found is None or row["reason"]:
        return row
    row["path"] = f"{number:05d}.mp4"
    row["face"] = round(min(person.side for person in found.people), 1)
    row["turn"] = round(min(person.yaws[1] - person.yaws[0] for person in found.people), 1)
    row["people"] = []
    for place, person in enumerate(found.people):
        shots = []
        for shot_number, shot in enumerate(person.shots):
            name = f"{number:05d}-{place}-{shot_number}.png"
            (folder / name).write_bytes(shot.png)
            shots.append(
                {"path": name, "quality": round(shot.quality, 3), "yaw": round(shot.yaw, 1)}
            )
        row["people"].append(
            {"embedding": [round(float(x), 6) for x in person.embedding], "photos": shots}
        )
    return row


def _write_clips(
    clip: Clip,
    listed: Sequence[tuple[int, Span]],
    rate: float,
    borders: tuple[int, int, int, int],
    folder: Path,
) -> None:
    """Write the mp4 files of clips in one pass over the film.

    Args:
      clip: the film.
      listed: number and frames of the clips.
      rate: frames per second.
      borders: picture inside the black borders.
      folder: folder of the film.
    """
    size = borders[1] - borders[0], borders[3] - borders[2]
    with contextlib.ExitStack() as stack:
        current, encode = -1, None
        for number, _, pixels in _frames_of(clip, listed):
            if number != current:
                stack.close()
                path = folder / f"{number:05d}.mp4"
                encode = stack.enter_context(video_writer(path, size, rate))
                current = number
            if encode is not None:
                encode(_cropped(pixels, borders))
