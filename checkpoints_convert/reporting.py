"""Print what the `idgrpo-convert` command finds in a checkpoint, and its progress."""

from __future__ import annotations

import collections
import contextlib
import math
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

from checkpoints_convert import lora, quantized, store
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.identify import FACE
from checkpoints_convert.lazy import blank, iter_chunks, size
from checkpoints_convert.network import blank_matrices, describe_blanks
from jax_idgrpo.errors import UserError

SHOWN = 10  # differences that `verify` prints, extra names that `inspect` prints
SIZES = {  # tensors of the published transformers
    (1264, 2_153_972_032): "1.3B",
    (1331, 17_337_592_896): "14B",
    (825, 1_418_996_800): "1.3B",
    (1095, 14_288_491_584): "14B",
}


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


def describe(opened: Checkpoint) -> None:
    """Print a line per network: layout, counts, bytes and dtypes.

    Raises:
      UserError: the tensors do not fit the network.
    """
    for network in opened.networks.values():
        tensors = [quantized.stored(tensor) for tensor in network.tensors.values()]
        count = sum(math.prod(tensor.shape) for tensor in tensors)
        dtypes = collections.Counter(str(tensor.dtype) for tensor in tensors)
        kinds = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.most_common())
        name = (
            network.values.get("name") if network.part == FACE else SIZES.get((len(tensors), count))
        )
        print(
            f"{network.part}: {f'{name}, ' if name else ''}{network.layout} layout, "
            f"{len(tensors)} tensors, {count:,} parameters, {sum(map(size, tensors)):,} bytes, "
            f"{kinds} ({network.source})"
        )
        if network is opened.adapter:
            widths, heights = lora.sizes(network.tensors)
            stacks = ", ".join(f"{count} {stack}" for stack, count in heights.items() if count)
            width = " or ".join(map(str, sorted(widths)))
            print(
                "adapter: rank {}, alpha {:g}, ".format(*network.config)
                + f"for width {width}, {stacks}"
            )
        if network.extra:
            more = ", ..." if len(network.extra) > SHOWN else ""
            print(
                f"{network.part}: {len(network.extra)} extra: "
                f"{', '.join(network.extra[:SHOWN])}{more}"
            )
    for network in opened.networks.values():
        network.matched()


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
