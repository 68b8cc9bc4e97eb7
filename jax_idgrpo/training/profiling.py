"""Profile two training steps: a device trace, and a table of seconds per phase."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import print_once
from jax_idgrpo.workdir import write_text

STEPS = 2  # number of traced steps


@dataclasses.dataclass
class Profile:
    """Trace two steps of a run into `folder`.

    The first step of a process is not traced, because it includes compilation. Writes a trace for
    TensorBoard or Perfetto, and `phases.md`.

    Attributes:
      folder: output folder; None disables profiling.
      first: training steps done at the start of the process. Tracing starts one step later.
      last: total number of training steps.
      rows: logged values of the traced steps.
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
        """Start the trace if it begins with this step. Call before every step."""
        if self.folder is not None and step == self.first + 1:
            jax.profiler.start_trace(self.folder)

    def end(self, step: int, row: Mapping[str, float], phases: Sequence[str]) -> None:
        """Record a step, and finish the trace after the last one. Call after every step.

        Args:
          step: number of the step, from 0.
          row: logged values of the step.
          phases: names of the values in `row` that are seconds of a phase.
        """
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
    """Format mean seconds and share of the total of each phase as a Markdown table."""
    seconds = {
        name.removeprefix("seconds_"): sum(row[name] for row in rows) / len(rows) for name in phases
    }
    total = sum(seconds.values())
    lines = [f"| {name} | {value:.3f} | {value / total:.0%} |" for name, value in seconds.items()]
    return "\n".join(
        ["| phase | seconds | share |", "|---|---|---|", *lines, f"| step | {total:.3f} | 100% |"]
    )
