"""Log a run to `metrics.jsonl`, TensorBoard files, optionally W&B, and a progress line.

Only process 0 logs. A row belongs to a training step (0, 1, ...). Resuming at step s drops the rows
from s on, so a resumed run leaves the same file as an uninterrupted one.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file. A last line that was cut off by a kill is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class MetricsWriter:
    """Write one row of scalars per call on process 0; do nothing on other processes.

    Args:
      workdir: folder for `metrics.jsonl` and `tensorboard/`.
      step: next step; rows of this step and later are dropped.
      wandb: W&B project; "" disables W&B.
      config_json: the configuration, for W&B.

    Raises:
      UserError: W&B is enabled but not installed.
    """

    def __init__(self, workdir: Path, *, step: int = 0, wandb: str = "", config_json: str = "{}"):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import

        self._wandb = _start_wandb(wandb, workdir, config_json) if wandb else None
        path = workdir / "metrics.jsonl"
        write_text(path, "".join(_line(row) for row in read_metrics(path) if row["step"] < step))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append the row of a training step; a number that is not finite is stored as null."""
        if not self._active:
            return
        row = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"step": step, **row}))
        self._file.flush()
        for name, value in row.items():
            if math.isfinite(value):  # TensorBoard warns of every other value
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        """Close the files."""
        if not self._active:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(row: Mapping[str, int | float | None]) -> str:
    finite = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _start_wandb(project: str, workdir: Path, config_json: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"run.wandb is {project!r} but wandb is not installed; pip install wandb, or leave "
            "run.wandb empty"
        ) from None
    # From the path, so that a resumed run appends to the same W&B run.
    name = f"{workdir.name}-{hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]}"
    return wandb.init(
        project=project, dir=str(workdir), config=json.loads(config_json), id=name, resume="allow"
    )


def _text(metrics: Mapping[str, SupportsFloat]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error of process 0.

    Where standard error is no terminal, a line is printed for every update with metrics.

    Args:
      label: text before the bar.
      total: number of steps.
      done: steps that were done before.

    Yields:
      `update(done, metrics=None)`, which shows the latest metrics and the time left.
    """
    console = Console(stderr=True, quiet=jax.process_index() != 0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # From the second update on, the time left is counted from the first update, because the first
    # step includes compilation.
    since = (time.monotonic(), done)
    first = done
    with Progress(
        *columns, console=console, disable=not console.is_terminal, refresh_per_second=2
    ) as bar:
        task = bar.add_task(label, total=total, completed=done, metrics="")

        def update(done: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
            nonlocal since
            now, (began, before) = time.monotonic(), since
            if before == first:
                since = now, done
            if metrics is None:
                bar.update(task, completed=done)
                return
            bar.update(task, completed=done, metrics=_text(metrics))
            if not console.is_terminal:
                left = (now - began) / max(done - before, 1) * (total - done)
                console.print(
                    f"{label} {done}/{total}  {_text(metrics)}  {left:.0f} s left",
                    highlight=False,
                    soft_wrap=True,
                )

        yield update
