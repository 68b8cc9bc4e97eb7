"""What a command has finished, so that the same command continues where it stopped.

Every finished video has a JSON line with a key: a hash of all that decides it. A line counts if its
key is that of the current command; so a changed adapter, photo or setting is never taken for the
same, and the number of devices or the batch size, which decide nothing, may change.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import folder_facts, gather_objects
from jax_idgrpo.workdir import write_text


def digest(*parts: Any) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def prompt_facts(prompt: Prompt) -> list[Any]:
    """Number of a prompt, and a hash of its text and photos."""
    return [prompt.id, *row_digests([prompt])]


def video_facts(config: Config, adapter: Path | None) -> list[Any]:
    """All that decides a video beside its prompt: model, adapter, size, schedule, seed."""
    model, wanted = config.model, config.evaluate
    return [
        version("jax-idgrpo"),
        [model.path, model.kind, model.dtype, folder_facts(model.folder())],
        folder_facts(adapter) if adapter else "",
        [config.data.max_people, config.data.text_length, dataclasses.asdict(config.video)],
        [wanted.steps, wanted.solver, wanted.guidance or config.rollout.guidance],
        [config.rollout.shift, config.image_guidance(evaluation=True), config.run.seed],
    ]


def reward_facts(config: Config) -> list[Any]:
    """All that decides the scores of a video: the configuration of the reward, and its files."""
    wanted = config.reward
    named = [wanted.folder()] if wanted.faces else []
    named += [Path(name) for name in (wanted.head, wanted.vlm, wanted.vlm_base) if name]
    files = [folder_facts(path) for path in named if path.exists()]
    return [version("jax-idgrpo"), dataclasses.asdict(wanted), files]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may be missing; one that was cut off by a kill is no line."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def text_of(lines: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


class Journal:
    """A file of JSON lines that grows by what is finished. Only process 0 touches it."""

    def __init__(self, path: Path, lines: Sequence[Mapping[str, Any]]):
        """Begin with `lines`, those of the file that still count."""
        self._path = path
        if jax.process_index() == 0:
            write_text(path, text_of(lines))

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, and hand them to the system at once."""
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(text_of(lines))


def decided(function: Callable[[], Any]) -> Any:
    """What a function says in process 0, where the files are; all processes call it together.

    The result is one that JSON can hold.

    Raises:
      UserError: the function raised it.
    """
    answer: list[Any] = [None, ""]
    if jax.process_index() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    value, refused = gather_objects(answer)[0]
    if refused:
        raise UserError(refused)
    return value
