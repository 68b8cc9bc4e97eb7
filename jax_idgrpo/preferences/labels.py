"""Keep the labels that people give to pairs of videos, and decide which pair each person sees next.

Labels are appended to `labels.jsonl`, one line per answer, and flushed to the disk before an answer
is acknowledged. A line that a crash cut off is ignored. Undoing an answer appends a line, too.

A share of the pairs (`overlap`) is shown to every annotator, so that agreement can be measured. Every
other pair is shown to one annotator. Gold pairs, whose answer is known, are shown to every annotator
at regular distances, and measure how well each annotator works.

Left and right are exchanged for half of the pairs, by a hash of annotator and pair. Stored labels
always refer to A and B of the CSV.
"""

import collections
import csv
import io
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_idgrpo.data.prompts import SEPARATOR
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.csv_source import COLUMNS
from jax_idgrpo.preferences.label_items import ANSWERS, Item, alpha, draw, majority, relative
from jax_idgrpo.workdir import write_text

EVERY = 10  # position of the first gold pair, and distance to the next
RESERVED = 600.0  # seconds that an unanswered pair stays with an annotator
LOG = "labels.jsonl"


@dataclass(frozen=True)
class Unit:
    """One question: a pair and the dimensions that are asked about it together."""

    item: Item
    dimensions: tuple[str, ...]

    @property
    def id(self) -> str:
        """Name of the question, unique among all units."""
        return f"{self.item.id}.{'+'.join(self.dimensions)}"


@dataclass(frozen=True)
class Answer:
    """An annotator's answer to a unit; no labels if it was skipped.

    seconds: time that the annotator took.
    """

    annotator: str
    unit: str
    labels: Mapping[str, str]
    seconds: float = 0.0


class Refused(Exception):
    """An answer that cannot be accepted, as one line."""


class Desk:
    """Hand out units to annotators and store their answers; safe to use from several threads."""

    def __init__(
        self,
        items: Sequence[Item],
        gold: Sequence[Item],
        dimensions: Sequence[str],
        folder: Path,
        overlap: float = 0.2,
        one_at_a_time: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Read the answers that the folder holds.

        Args:
          items: pairs to label, in order.
          gold: pairs with known answers.
          dimensions: dimensions to label.
          folder: existing folder of `labels.jsonl`.
          overlap: share of the pairs that every annotator labels, in [0, 1].
          one_at_a_time: whether all pairs are asked about the first dimension before the second.
          clock: seconds, for reservations.

        Raises:
          UserError: the folder holds answers that are not of this format.
        """
        groups = [(name,) for name in dimensions] if one_at_a_time else [tuple(dimensions)]
        known = {item.id for item in gold}
        self.items = [item for item in items if item.id not in known]
        self.gold, self.dimensions = list(gold), tuple(dimensions)
        self._units = [Unit(item, group) for group in groups for item in self.items]
        self._gold = [Unit(item, tuple(item.gold)) for item in gold]
        self._of = {unit.id: unit for unit in (*self._units, *self._gold)}
        self._shared = {item.id for item in self.items if draw("overlap", item.id) < overlap}
        self._lock, self._clock = threading.Lock(), clock
        self._answers: dict[str, dict[str, Answer]] = collections.defaultdict(dict)  # by annotator
        self._voters: dict[str, set[str]] = collections.defaultdict(set)  # by unit
        self._reserved: dict[str, tuple[str, float]] = {}  # unit -> annotator, end of reservation
        self._settled: dict[str, int] = collections.defaultdict(int)  # first units of an annotator
        self._path = folder / LOG
        self._read()
        self._file = self._path.open("ab")
        if self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n"):
            self._append(b"\n")  # ends the line that a crash cut off

    # ---- storage ---------------------------------------------------------------------------------

    def _read(self) -> None:
        text = self._path.read_bytes() if self._path.exists() else b""
        for number, line in enumerate(text.split(b"\n"), 1):
            try:
                value = json.loads(line) if line.strip() else None
            except ValueError:
                continue  # cut off by a crash
            if value is None:
                continue
            try:
                self._apply(
                    Answer(value["annotator"], value["unit"], value["labels"], value["seconds"]),
                    undone=bool(value["undone"]),
                )
            except (KeyError, TypeError):
                raise UserError(
                    f"{self._path}, line {number}: is no label of this program; name another folder"
                ) from None

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _apply(self, answer: Answer, undone: bool = False) -> None:
        self._answers[answer.annotator].pop(answer.unit, None)
        self._voters[answer.unit].discard(answer.annotator)
        self._reserved.pop(answer.unit, None)
        if undone:
            self._settled.clear()
        else:
            self._answers[answer.annotator][answer.unit] = answer
            if answer.labels:
                self._voters[answer.unit].add(answer.annotator)

    def _store(self, answer: Answer, undone: bool = False) -> None:
        line = {
            "annotator": answer.annotator,
            "unit": answer.unit,
            "labels": dict(answer.labels),
            "seconds": round(answer.seconds, 2),
            "undone": undone,
        }
        self._append(json.dumps(line).encode() + b"\n")
        self._apply(answer, undone)

    def close(self) -> None:
        """Close the file of labels."""
        self._file.close()

    # ---- questions and answers -------------------------------------------------------------------

    def next(self, annotator: str, count: int = 1) -> list[Unit]:
        """Return the next units of an annotator, and reserve them for a while.

        Args:
          annotator: name of the annotator.
          count: number of units; fewer are returned at the end.
        """
        now = self._clock()
        with self._lock:
            done = self._answers[annotator]
            gold = [unit for unit in self._gold if unit.id not in done]
            free = self._free(annotator, now)
            found: list[Unit] = []
            while len(found) < count:
                turn = gold and (len(done) + len(found) + 1) % EVERY == 0
                unit = gold.pop(0) if turn else next(free, None)
                if unit is None:
                    found += gold[: count - len(found)]
                    break
                found.append(unit)
            for unit in found:
                self._reserved[unit.id] = annotator, now + RESERVED
            return found

    def _free(self, annotator: str, now: float) -> Iterator[Unit]:
        """Yield the units that an annotator can get now."""
        while self._settled[annotator] < len(self._units) and self._is_settled(
            self._units[self._settled[annotator]], annotator
        ):
            self._settled[annotator] += 1
        for unit in itertools.islice(self._units, self._settled[annotator], None):
            holder, end = self._reserved.get(unit.id, (annotator, now))
            held = holder != annotator and end > now and unit.item.id not in self._shared
            if not held and not self._is_settled(unit, annotator):
                yield unit

    def _is_settled(self, unit: Unit, annotator: str) -> bool:
        """Return whether the annotator need not answer a unit any more."""
        if unit.id in self._answers[annotator]:
            return True
        return unit.item.id not in self._shared and bool(self._voters[unit.id])

    def answer(self, answer: Answer) -> None:
        """Store an answer; a second answer of one annotator replaces the first.

        Raises:
          Refused: the unit or a label is unknown, or a dimension is missing.
        """
        unit = self._of.get(answer.unit)
        if unit is None:
            raise Refused("no such pair; load the page again")
        if answer.labels and set(answer.labels) != set(unit.dimensions):
            raise Refused(f"label {', '.join(unit.dimensions)}")
        if unknown := [text for text in answer.labels.values() if text not in ANSWERS]:
            raise Refused(f"a label is {unknown[0]!r}; use {', '.join(ANSWERS)}")
        with self._lock:
            self._store(answer)

    def undo(self, annotator: str) -> Unit | None:
        """Take back the last answer of an annotator and return its unit; None if there is none."""
        with self._lock:
            done = self._answers[annotator]
            if not done:
                return None
            last = next(reversed(done))
            self._store(done[last], undone=True)
            return self._of.get(last)

    def exchanged(self, annotator: str, item: Item) -> bool:
        """Return whether the annotator sees video B on the left."""
        return draw("side", annotator, item.id) < 0.5

    def unit(self, number: str) -> Unit | None:
        """Return the unit with this name; None if there is none."""
        return self._of.get(number)

    # ---- results ---------------------------------------------------------------------------------

    def progress(self, annotator: str) -> tuple[int, int]:
        """Return the number of answers of an annotator, and that of units left for them and done."""
        with self._lock:
            done = self._answers[annotator]
            left = sum(not self._is_settled(unit, annotator) for unit in self._units)
            left += sum(unit.id not in done for unit in self._gold)
            return len(done), len(done) + left

    def votes(self) -> dict[str, dict[str, dict[str, str]]]:
        """Return the labels by pair, dimension and annotator; gold pairs are left out."""
        found: dict[str, dict[str, dict[str, str]]] = {}
        with self._lock:
            for annotator, answers in self._answers.items():
                for answer in answers.values():
                    unit = self._of.get(answer.unit)
                    if unit is None or unit.item.gold:
                        continue
                    for name, text in answer.labels.items():
                        found.setdefault(unit.item.id, {}).setdefault(name, {})[annotator] = text
        return found

    def summary(self) -> dict[str, Any]:
        """Return progress and quality: answers by annotator, agreement, and accuracy on gold pairs.

        `alpha` is Krippendorff's alpha of nominal labels by dimension; None without two votes on a
        pair, or if all labels are equal.
        """
        votes = self.votes()
        with self._lock:
            people = {
                name: {
                    "answers": len(answers),
                    "skipped": sum(not answer.labels for answer in answers.values()),
                    "gold": _accuracy(answers, self._gold),
                }
                for name, answers in self._answers.items()
                if answers
            }
        names = list(people)
        return {
            "pairs": len(self.items),
            "labelled": len(votes),
            "annotators": people,
            "alpha": {name: alpha(votes, name, names) for name in self.dimensions},
        }

    def export(self, out: Path) -> int:
        """Write the labelled pairs as a CSV for `train-reward`, and return their number.

        The label is that of the majority. Without a majority it is "invalid". The columns votes_*
        hold all votes.

        Args:
          out: the CSV; paths are relative to it.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(
            (*COLUMNS, *self.dimensions, "source", *(f"votes_{name}" for name in self.dimensions))
        )
        votes, count = self.votes(), 0
        for item in self.items:
            if item.id not in votes:
                continue
            of = [votes[item.id].get(name, {}) for name in self.dimensions]
            videos = (relative(path, out) for path in item.row.videos)
            photos = SEPARATOR.join(relative(path, out) for path in item.row.references)
            rows.writerow(
                (
                    *videos,
                    item.row.prompt,
                    photos,
                    *(majority(list(given.values())) for given in of),
                    "trusted",
                    *(
                        " ".join(f"{name}={text}" for name, text in sorted(given.items()))
                        for given in of
                    ),
                )
            )
            count += 1
        write_text(out, text.getvalue())
        return count


def _accuracy(answers: Mapping[str, Answer], gold: Sequence[Unit]) -> float | None:
    """Return the share of right answers to gold pairs; None without any."""
    right = [
        answers[unit.id].labels[name] == text
        for unit in gold
        if unit.id in answers and answers[unit.id].labels
        for name, text in unit.item.gold.items()
    ]
    return float(np.mean(right)) if right else None
