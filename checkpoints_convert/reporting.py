"""Print what the `idgrpo-convert` command finds in a checkpoint, and its progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from checkpoints_convert import quantized, store
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.lazy import blank, iter_chunks, size
from checkpoints_convert.network import blank_matrices, describe_blanks
from jax_idgrpo.errors import UserError


@contextlib.contextmanager
def bar(total: int, done: int, what: str = "writing") -> Iterator[store.Progress]:
    """Show a progress bar in bytes on standard error if it is a terminal.

    Args:
      total: bytes in all.
      done: bytes that were done before.
      what: text before the bar.

    Yields:
      `update(name, count)`, to call with the bytes of each tensor as they are done.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, refresh_per_second=4
    ) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda name, count: progress.update(task, advance=count)


def print_notices(opened: Checkpoint, dtype: str | None = None) -> None:
    """Print a line for everything that was chosen, left out or dequantized.

    Args:
      opened: the checkpoint.
      dtype: dtype of dequantized weights, if the user states it.

    Raises:
      UserError: the user states a dtype and there are no weights to dequantize.
    """
    for network in opened.networks.values():
        for notice in network.notices:
            print(f"{network.part}: {notice}")
    tensors = (
        tensor for network in opened.networks.values() for tensor in network.tensors.values()
    )
    if dtype is not None and quantized.notice(tensors) is None:
        raise UserError(
            f"--dtype {dtype}: {opened.path} has no fp8 weights, and others keep their dtype; "
            "leave it out"
        )


def check_values(opened: Checkpoint) -> None:
    """Read every tensor, and print a line for an adapter that changes nothing.

    Raises:
      UserError: a tensor holds NaN or infinite values.
    """
    tensors = [
        (network, *pair) for network in opened.networks.values() for pair in network.matched()
    ]
    with bar(sum(size(tensor) for _, _, tensor in tensors), 0, "reading") as read:
        for _, slot, tensor in tensors:
            for chunk in iter_chunks(tensor, check=True):
                read(slot.name, chunk.nbytes)
    if opened.adapter is not None:
        outputs = [
            tensor for slot, tensor in opened.adapter.matched() if slot.name.endswith("lora_b")
        ]
        if all(map(blank, outputs)):
            print("adapter: this adapter changes nothing: every lora_B is zero")


def warn_of_blanks(opened: Checkpoint) -> None:
    """Print a line on standard error for every network with matrices of only zeros."""
    for network in opened.networks.values():
        if blanks := blank_matrices(network):
            print(
                f"idgrpo-convert: warning: {network.source}: {describe_blanks(blanks)}",
                file=sys.stderr,
            )
