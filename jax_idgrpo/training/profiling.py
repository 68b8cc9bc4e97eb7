"""A profile of a few training steps: the profiler's trace of the devices, and a table of seconds by phase."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import print_once
from jax_idgrpo.workdir import write_text

STEPS = 2  # that are traced


@dataclasses.dataclass
class Profile:
    """Traces steps `first + 1` and the one after it into `folder`; the first step of a process compiles, and is left out.

    Leaves the trace, which TensorBoard and Perfetto read, and `phases.md`. folder None: nothing is traced.
    """

    folder: Path | None
    first: int
    last: int
    rows: list[Mapping[str, float]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None and self.last - self.first < 2:
            raise UserError(
                f"--profile: step {self.first} of {self.last} is next, and the first step of a process compiles; "
                "profiling takes 2 steps at least, so raise --run.steps"
            )

    def begin(self, step: int) -> None:
        """Call before a step."""
        if self.folder is not None and step == self.first + 1:
            jax.profiler.start_trace(self.folder)

    def end(self, step: int, row: Mapping[str, float], phases: Sequence[str]) -> None:
        """Call after a step with what it logged; the names of its phases are columns of it."""
        if self.folder is None or not self.first < step <= self.first + STEPS:
            return
        self.rows.append(row)
        if step == min(self.first + STEPS, self.last - 1):
            jax.profiler.stop_trace()
            table = phase_table(self.rows, phases)
            if jax.process_index() == 0:
                write_text(self.folder / "phases.md", table + "\n")
            print_once(f"\n{table}\n\nprofile of {len(self.rows)} steps: {self.folder}")


def phase_table(rows: Sequence[Mapping[str, float]], phases: Sequence[str]) -> str:
    """Mean seconds of each phase over the rows, and its share of their sum, as a Markdown table."""
    seconds = {
        name.removeprefix("seconds_"): sum(row[name] for row in rows) / len(rows) for name in phases
    }
    total = sum(seconds.values())
    lines = [f"| {name} | {value:.3f} | {value / total:.0%} |" for name, value in seconds.items()]
    return "\n".join(
        ["| phase | seconds | share |", "|---|---|---|", *lines, f"| step | {total:.3f} | 100% |"]
    )
