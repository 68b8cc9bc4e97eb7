"""Score video files one after the other, each once, although a command may be interrupted.

A finished video has a line with its key (see `journal`) in `OUT.part`, or in the report if there is
one. The processes of a run share the videos.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import journal, recognition
from jax_idgrpo.evaluation.recorder import Recorder, recorded
from jax_idgrpo.evaluation.streaming import FileScorer
from jax_idgrpo.metrics import progress
from jax_idgrpo.parallel.hosts import folder_facts, gather_objects, print_once, run_once
from jax_idgrpo.workdir import write_text

Row = tuple[Path, Prompt]
"""A video file and its prompt."""
Line = dict[str, Any]
"""The values of a video, with its key, or a null reward with an error."""


def keys_of(config: Config, rows: Sequence[Row], gallery: Sequence[Prompt]) -> list[str]:
    """Hash everything that each score depends on (collective).

    Args:
      config: settings of the reward.
      rows: the videos.
      gallery: the prompts among whose photos people are recognised.
    """
    facts = journal.reward_facts(config), recognition.gallery_facts(config, gallery)
    of_prompt = {prompt.id: journal.prompt_facts(prompt) for _, prompt in rows}
    return journal.decided(
        lambda: [
            journal.digest(facts, folder_facts(file), of_prompt[prompt.id]) for file, prompt in rows
        ]
    )


def finished_lines(part: Path, report: Path | None, keys: Sequence[str]) -> dict[str, Line]:
    """Read the lines of the videos that an earlier command has scored, by their keys (collective).

    Args:
      part: the unfinished scores, which are read if there is no report.
      report: folder of the report.
      keys: keys of the present videos; lines with other keys are left out.
    """
    known = journal.decided(
        lambda: journal.read_lines(part) if report is None else recorded(report, keys)
    )
    return {line["key"]: line for line in known if line.get("key") in set(keys)}


def score_rows(
    scorer: FileScorer,
    recorder: Recorder | None,
    waiting: Sequence[tuple[str, Path, Prompt]],
    part: Path,
    lines: Mapping[str, Line],
) -> tuple[dict[str, Line], dict[str, Line]]:
    """Score videos, and write the line of each as soon as it is known (collective).

    Args:
      scorer: scores a video.
      recorder: scores a video and records its faces, if there is a report.
      waiting: keys, files and prompts of the videos.
      part: file of the unfinished scores.
      lines: lines of the videos that are scored already.

    Returns:
      The lines of all scored videos, and those of videos that could not be scored, by key.
    """
    done, refused = dict(lines), dict[str, Line]()
    written = journal.Journal(part, list(done.values()))
    step, mine = jax.process_count(), jax.process_index()
    with progress("scoring", len(done) + len(waiting), len(done)) as update:
        for first in range(0, len(waiting), step):
            own = waiting[first + mine : first + mine + 1]
            found = [
                line
                for part_of_process in gather_objects(
                    [_scored(scorer, recorder, *row) for row in own]
                )
                for line in part_of_process
            ]
            good = [line for line in found if "error" not in line]
            done |= {line["key"]: line for line in good}
            written.add(good)
            for line in found:
                if "error" in line:
                    refused[line["key"]] = line
                    run_once(print, line["error"], file=sys.stderr)
            update(len(done) + len(refused))
    return done, refused


def _scored(
    scorer: FileScorer, recorder: Recorder | None, key: str, file: Path, prompt: Prompt
) -> dict[str, Any]:
    """Score a video and return its line: its values, or a null reward and the error."""
    line: dict[str, Any] = {"key": key, "file": file.name, "prompt": prompt.text}
    details: dict[str, Any] = {}
    try:
        clip = Clip.open(file)
        if recorder is None:
            values = scorer(clip, prompt)
        else:
            values, details = recorder(clip, prompt)
        if not math.isfinite(values["reward"]):
            raise UserError(f"video {file}: the reward is {values['reward']}")
    except UserError as error:
        if recorder is not None:
            recorder.discard(file)
        return line | {"reward": None, "error": str(error)}
    line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
    if recorder is not None:
        recorder.keep(file, line, details)
    return line


def write_scores(out: Path, lines: Sequence[Line]) -> None:
    """Write the lines of all videos without their keys, and print the mean reward.

    Args:
      out: output file.
      lines: lines in the order of the videos.
    """
    public = ({name: line[name] for name in line if name != "key"} for line in lines)
    run_once(write_text, out, journal.text_of(public))
    rewards = {line["key"]: line["reward"] for line in lines if "error" not in line}
    mean = f"; mean reward {np.mean([*rewards.values()]):.4f}" if rewards else ""
    print_once(f"{len(rewards)} scores in {out}{mean}")
