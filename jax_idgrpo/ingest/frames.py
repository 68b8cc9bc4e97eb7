"""Measure the frames of a film, find its cuts, and judge clips by cheap measures.

One pass over the film keeps a few numbers per frame, so memory does not depend on its length.

The measure of a cut is the mean absolute difference of hue, saturation and value between
neighbouring frames, 0 to 255, as in PySceneDetect. Hue is a circle. A cut is where it is large, or
large compared with its neighbours. Bounds of luminance and the adaptive rule are those of
OpenHumanVid (arXiv 2412.00115) and PySceneDetect; the bounds of sharpness and motion are ours.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

WIDTH = 256  # pixels of the reduced picture for cuts and motion
HEIGHT = 256  # pixels of the picture for sharpness, at most
STRONG, WEAK, RATIO, LEAST = 27.0, 15.0, 3.0, 15
MARGIN = 2  # frames dropped at each cut
BORDER = 16  # largest value of a black border
SAMPLES = 8  # frames of a clip for luminance and sharpness
EVERY = 12  # frames between those that the borders are measured on


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a clip must be like; see `idgrpo ingest --help`.

    Attributes:
      seconds: shortest and longest clip; longer scenes are divided.
      luminance: smallest and largest mean luminance, 0 to 255.
      sharpness: least variance of the Laplacian of the luminance.
      motion: smallest and largest mean difference of neighbouring frames, in units of [-1, 1].
      stalled: largest share of steps with less than the smallest motion.
    """

    seconds: tuple[float, float] = (2.0, 20.0)
    luminance: tuple[float, float] = (10.0, 210.0)
    sharpness: float = 20.0
    motion: tuple[float, float] = (0.002, 0.25)
    stalled: float = 0.3


@dataclasses.dataclass(frozen=True)
class Span:
    """A range of frames with its measures, and why it is left out ("" if it is not).

    Attributes:
      start: first frame.
      end: frame after the last.
      reason: reason for leaving it out.
      value: the measure behind the reason.
      measures: luminance, sharpness, motion and stalled.
    """

    start: int
    end: int
    reason: str = ""
    value: float = 0.0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


class Statistics:
    """Numbers of every frame, added one by one."""

    def __init__(self) -> None:
        self.change: list[float] = []
        self.motion: list[float] = []
        self.luminance: list[float] = []
        self.sharpness: list[float] = []
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._rows: np.ndarray | None = None
        self._columns: np.ndarray | None = None

    def add(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Measure the next frame."""
        picture = Image.fromarray(frame)
        width = min(WIDTH, picture.width)
        small = picture.resize((width, max(1, round(picture.height * width / picture.width))), _BOX)
        pixels = np.asarray(small, np.int16)
        hsv = np.asarray(small.convert("HSV"), np.int16)
        before = self._last
        self.change.append(0.0 if before is None else _hsv_change(before[1], hsv))
        moved = 0.0 if before is None else float(np.abs(pixels - before[0]).mean()) / 127.5
        self.motion.append(moved)
        self._last = pixels, hsv
        grey = np.asarray(small.convert("L"), np.float32)
        self.luminance.append(float(grey.mean()))
        self.sharpness.append(laplacian_variance(picture))
        if (len(self.change) - 1) % EVERY == 0:
            rows, columns = frame.max(axis=(1, 2)), frame.max(axis=(0, 2))
            self._rows = rows if self._rows is None else np.maximum(self._rows, rows)
            self._columns = columns if self._columns is None else np.maximum(self._columns, columns)

    def borders(self) -> tuple[int, int, int, int]:
        """Return the picture inside the black borders: top, bottom, left, right, of even size."""
        if self._rows is None or self._columns is None:
            return 0, 0, 0, 0
        top, bottom = _inside(self._rows)
        left, right = _inside(self._columns)
        return top, bottom, left, right


_BOX = Image.Resampling.BOX


def _inside(most: UInt8[np.ndarray, " N"]) -> tuple[int, int]:
    """Return the range of values above `BORDER`, of even length; everything if there are none."""
    bright = np.flatnonzero(most >= BORDER)
    start, end = (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, len(most))
    return start, end - (end - start) % 2


def _hsv_change(before: np.ndarray, now: np.ndarray) -> float:
    difference = np.abs(now - before)
    difference[..., 0] = np.minimum(difference[..., 0], 256 - difference[..., 0])
    return float(difference.mean())


def laplacian_variance(picture: Image.Image) -> float:
    """Compute the variance of the Laplacian of the luminance, at most 256 pixels high."""
    if picture.height > HEIGHT:
        size = max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT
        picture = picture.resize(size, _BOX)
    grey = np.asarray(picture.convert("L"), np.float32)
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * inner).var())


def find_cuts(change: Sequence[float]) -> list[int]:
    """Return the first frame of every scene but the first.

    Args:
      change: difference of every frame from the one before, 0 to 255; 0 for the first.
    """
    values = np.asarray(change, np.float64)
    candidates = []
    for frame in range(1, len(values)):
        near = np.concatenate([values[max(frame - 2, 1) : frame], values[frame + 1 : frame + 3]])
        usual = float(near.mean()) if len(near) else 0.0
        if values[frame] >= STRONG or (values[frame] >= WEAK and values[frame] >= RATIO * usual):
            candidates.append(frame)
    found = [0]
    for frame in sorted(candidates, key=lambda frame: -values[frame]):  # the strongest first
        if min(abs(frame - other) for other in found) >= LEAST:
            found.append(frame)
    return sorted(found)[1:]


def scenes(change: Sequence[float]) -> list[tuple[int, int]]:
    """Return first frame and end of every scene, without the margin at its cuts."""
    edges = [0, *find_cuts(change), len(change)]
    return [
        (start + MARGIN * (start > 0), end - MARGIN * (end < len(change)))
        for start, end in itertools.pairwise(edges)
    ]


def spans(statistics: Statistics, rate: float, limits: Limits) -> list[Span]:
    """Divide a film into clips, and give a reason for each that is left out.

    Args:
      statistics: numbers of all frames.
      rate: frames per second.
      limits: what a clip must be like.
    """
    found = []
    for start, end in scenes(statistics.change):
        least, most = (round(seconds * rate) for seconds in limits.seconds)
        if end - start < least:
            found.append(Span(start, max(end, start), "short", max(end - start, 0) / rate))
            continue
        parts = math.ceil((end - start) / max(most, 1))
        edges = np.linspace(start, end, parts + 1).round().astype(int).tolist()
        found += [_measured(statistics, *edge, limits) for edge in itertools.pairwise(edges)]
    return found


def _measured(statistics: Statistics, start: int, end: int, limits: Limits) -> Span:
    """Measure a clip and compare it with the limits.

    Args:
      statistics: numbers of all frames.
      start: first frame.
      end: frame after the last.
      limits: what a clip must be like.
    """
    shown = np.linspace(start, end - 1, SAMPLES).round().astype(int)
    steps = np.asarray(statistics.motion[start + 1 : end])
    luminance = float(np.mean([statistics.luminance[frame] for frame in shown]))
    sharpness = float(np.mean([statistics.sharpness[frame] for frame in shown]))
    motion = float(steps.mean()) if len(steps) else 0.0
    stalled = float((steps < limits.motion[0]).mean()) if len(steps) else 1.0
    measures = {
        "luminance": luminance,
        "sharpness": sharpness,
        "motion": motion,
        "stalled": stalled,
    }
    faults = (
        ("dark", luminance, luminance < limits.luminance[0]),
        ("bright", luminance, luminance > limits.luminance[1]),
        ("blurred", sharpness, sharpness < limits.sharpness),
        ("still", motion, motion < limits.motion[0]),
        ("unsteady", motion, motion > limits.motion[1]),
        ("stalled", stalled, stalled > limits.stalled),
    )
    for reason, value, applies in faults:
        if applies:
            return Span(start, end, reason, value, measures)
    return Span(start, end, "", 0.0, measures)
