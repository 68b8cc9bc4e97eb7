"""Read and write checklists: yes/no questions about a video, with weights.

`checklist.json` holds a list of objects, one per question:

    {"question": "Do all people of the pictures appear in the video?",
     "dimension": "presence", "weight": 1.0, "gate": null}

The questions are such that yes is the good answer. `gate` is the number, from 1, of an earlier
question; unless its answer is yes, the question does not count. `{text_prompt}` in a question
is replaced by the prompt of the video.

Source: VisionReward, arXiv 2412.21059; the format and the questions of this project are its own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jax_idgrpo.errors import UserError, closest
from jax_idgrpo.workdir import write_text

CHECKLIST = "checklist.json"
FIELDS = ("question", "dimension", "gate", "weight")
RESERVED = ("reward", "motion", "faces_asked")
"""Names of the other terms of a vision-language reward."""


@dataclass(frozen=True)
class ChecklistQuestion:
    """A question of a checklist.

    Attributes:
      question: text; yes is the good answer.
      dimension: name of the term that the answer belongs to.
      gate: number, from 1, of an earlier question that must be answered with yes; None for none.
      weight: 0 or more.
    """

    question: str
    dimension: str
    gate: int | None = None
    weight: float = 1.0


Checklist = tuple[ChecklistQuestion, ...]


def is_checklist(folder: str | Path) -> bool:
    """Return whether a folder of `reward.vlm` holds a checklist."""
    return bool(folder) and (Path(folder) / CHECKLIST).is_file()


def dimensions_of(checklist: Checklist) -> tuple[str, ...]:
    """Return the names of the dimensions, in the order of their first question."""
    return tuple(dict.fromkeys(asked.dimension for asked in checklist))


def read_checklist(file: Path) -> Checklist:
    """Read a checklist.

    Raises:
      UserError: the file cannot be read, or is no valid checklist.
    """
    try:
        rows = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error}); correct it") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{file}: should hold a list of questions; see configs/checklist_people.json"
        )
    found = tuple(_question(row, number, file) for number, row in enumerate(rows, 1))
    if not any(asked.weight > 0 and asked.gate is None for asked in found):
        raise UserError(
            f"{file}: no question without a gate has a positive weight, so a video may have no "
            "score; raise a weight"
        )
    return found


def _question(row: object, number: int, file: Path) -> ChecklistQuestion:
    """Check one entry.

    Args:
      row: the entry.
      number: its number, from 1.
      file: the checklist, for messages.

    Raises:
      UserError: the entry is invalid.
    """
    where = f"{file}: question {number}"
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: is no object; give question, dimension, gate and weight")
    for name in row:
        if name not in FIELDS:
            raise UserError(f"{where}: has no field {name!r}{closest(str(name), list(FIELDS))}")
    for name in ("question", "dimension"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: needs {name}, a text; add it")
    text, dimension = row["question"], row["dimension"]
    if not text.rstrip().endswith("?"):
        raise UserError(
            f"{where}: {text!r} is no question that yes or no can answer; end it with a question mark"
        )
    if not dimension.isidentifier() or dimension in RESERVED:
        raise UserError(
            f"{where}: dimension {dimension!r} cannot name a term; use letters, digits and _, and "
            f"none of {', '.join(RESERVED)}"
        )
    return ChecklistQuestion(
        text, dimension, _gate(row.get("gate"), number, where), _weight(row.get("weight", 1), where)
    )


def _gate(gate: object, number: int, where: str) -> int | None:
    if gate is None:
        return None
    if not isinstance(gate, int) or isinstance(gate, bool) or not 0 < gate < number:
        raise UserError(
            f"{where}: gate {gate!r} is no earlier question; give a number from 1 to {number - 1}, "
            "or null"
            if number > 1
            else f"{where}: gate {gate!r}, but there is no earlier question; use null"
        )
    return gate


def _weight(weight: object, where: str) -> float:
    if isinstance(weight, int | float) and not isinstance(weight, bool):
        number = float(weight)
        if math.isfinite(number) and number >= 0:
            return number
    raise UserError(
        f"{where}: weight {weight!r} is no number of 0 or more; ask the opposite question instead "
        "of a negative weight"
    )


def write_checklist(checklist: Sequence[ChecklistQuestion], file: Path) -> None:
    """Write a checklist, one question per line."""
    rows = [f"  {json.dumps(asdict(asked), ensure_ascii=False)}" for asked in checklist]
    write_text(file, "[\n" + ",\n".join(rows) + "\n]\n")
