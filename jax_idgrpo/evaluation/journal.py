"""Record finished videos, so that an interrupted command continues when it is run again.

Every finished video has a JSON line with a key, which is a hash of all inputs of the video. A line
is valid if its key equals that of the current command. A changed adapter, photo or setting
therefore invalidates it. The number of devices and the batch size are not part of the key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax

from checkpoints_convert.places import LoRASum
from jax_idgrpo.config import Config, EvaluateConfig
from jax_idgrpo.data.prompts import Prompt, load_prompts, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import folder_facts, gather_objects
from jax_idgrpo.sampling import lora_sum
from jax_idgrpo.workdir import write_text

Result = TypeVar("Result")


def digest(*parts: object) -> str:
    """Return a short hash of values that are serialisable as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def prompt_facts(prompt: Prompt) -> list[object]:
    """Return the number of a prompt, and a hash of its text and photos."""
    return [prompt.id, *row_digests([prompt])]


def lora_facts(lora: Path | LoRASum | None) -> object:
    """Return the content of an adapter, or contents and strengths of a sum of adapters."""
    if isinstance(lora, LoRASum):
        return [[folder_facts(path), scale] for path, scale in lora.parts]
    return folder_facts(lora) if lora else ""


def lora_files(name: str, lora: Path | LoRASum | None) -> dict[str, Path]:
    """Return the places of an adapter or of a sum of adapters, for comparison across processes."""
    parts = lora.parts if isinstance(lora, LoRASum) else ((lora or Path("none"), 1.0),)
    return {f"{name} {n + 1}" if n else name: path for n, (path, _) in enumerate(parts)}


def video_facts(config: Config, adapter: Path | LoRASum | None) -> list[object]:
    """Return all inputs of a video besides its prompt: model, adapter, size, schedule, seed."""
    model, wanted = config.model, config.evaluate
    merged = [lora_facts(lora_sum.base_loras(model))] if model.base_loras else []
    return [
        version("jax-idgrpo"),
        [model.path, model.kind, model.dtype, folder_facts(model.folder()), *merged],
        lora_facts(adapter),
        [config.data.max_people, config.data.text_length, dataclasses.asdict(config.video)],
        [wanted.steps, wanted.solver, *dict.fromkeys(config.guidance(evaluation=True))],
        [config.rollout.shift, config.image_guidance(evaluation=True), config.run.seed],
        *([wanted.weakened, wanted.control_scale] if _reweighted(wanted) else []),
        *([config.data.places_colours] if config.data.places_colours != "person" else []),
    ]


def _reweighted(wanted: EvaluateConfig) -> bool:
    """Return whether videos are sampled with a weakened branch, or with scaled hints."""
    return bool(wanted.weakened) or wanted.control_scale != 1


def reward_facts(config: Config) -> list[object]:
    """Return all inputs of a score besides the video: the configuration and files of the reward.

    A reward that compares people with those of all prompts depends on the photos of these prompts.
    """
    wanted = config.reward
    named = [wanted.folder()] if wanted.faces else []
    folders = wanted.head, wanted.linear, wanted.people, wanted.vlm, wanted.vlm_base
    named += [Path(name) for name in folders if name]
    files = [folder_facts(path) for path in named if path.exists()]
    facts: list[object] = [version("jax-idgrpo"), dataclasses.asdict(wanted), files]
    if not wanted.contrasted:
        return facts
    prompts = load_prompts(config.data.prompts_file(), config.data.max_people, decode=False)
    return [*facts, row_digests(prompts)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines from a file that may be missing; lines truncated by a kill are skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def text_of(lines: Iterable[Mapping[str, object]]) -> str:
    """Format as JSON lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


class Journal:
    """A file of JSON lines to which finished work is appended. Only process 0 accesses it."""

    def __init__(self, path: Path, lines: Sequence[Mapping[str, object]]):
        """Replace the content of the file by `lines`, its valid lines."""
        self._path = path
        if jax.process_index() == 0:
            write_text(path, text_of(lines))

    def add(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Append lines and flush them to the operating system."""
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(text_of(lines))


def decided(function: Callable[[], Result]) -> Result:
    """Call a function in process 0 and return its result in all processes (collective).

    The result must be serialisable as JSON.

    Raises:
      UserError: raised by the function.
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
