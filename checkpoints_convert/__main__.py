"""The `idgrpo-convert` command: what a checkpoint is, whether two are equal, into the project's store and out again.

Exit status: 0 done, 1 `verify` found differences, 2 a user's mistake, in one line on standard error.
"""

import argparse
import collections
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from checkpoints_convert import checkpoint
from checkpoints_convert.checkpoint import Network
from jax_idgrpo.errors import UserError

SHOWN = 10  # differences that `verify` prints
FORMATS = ("diffusers", "peft")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def describe(networks: Sequence[Network]) -> None:
    """One line per network: layout, counts, bytes, dtypes; then whatever does not fit, as a UserError."""
    for network in networks:
        tensors = network.tensors.values()
        sizes = [int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors]
        total = sum(size * tensor.dtype.itemsize for size, tensor in zip(sizes, tensors, strict=True))
        dtypes = collections.Counter(str(tensor.dtype) for tensor in tensors)
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        print(
            f"{network.part}: {network.layout} layout, {len(sizes)} tensors, {sum(sizes):,} parameters, "
            f"{total:,} bytes, {kinds} ({network.source})"
        )
    for network in networks:
        network.matched()


def run_inspect(path: Path) -> int:
    networks = checkpoint.open_checkpoint(path)
    if networks[0].part == "transformer":
        print(f"kind: {checkpoint.kind(path, takes_control(networks[0]))}")
    describe(networks)
    print("complete: every tensor of the network, no other")
    return 0


def run_verify(left: Path, right: Path) -> int:
    sides = [checkpoint.open_checkpoint(path) for path in (left, right)]
    count = 0
    for line in itertools.islice(checkpoint.differences(*sides), SHOWN + 1):
        count += 1
        print(line if count <= SHOWN else "...")
    if count:
        return 1
    tensors = sum(len(network.tensors) for network in sides[0])
    print(f"equal: {tensors} tensors, bit for bit")
    return 0


def run_import(source: Path, destination: Path, kind: str | None) -> int:
    networks = checkpoint.open_checkpoint(source)
    if networks[0].part == "adapter":
        if kind is not None:
            raise UserError(f"--as {kind}: {source} is an adapter, which has no kind; leave it out")
        checkpoint.write_adapter(networks[0], destination)
    else:
        found = pipeline_kind(source, networks, kind)
        checkpoint.write_pipeline(networks, destination, "store", found)
    print(f"wrote {destination}")
    return 0


def run_export(source: Path, destination: Path, form: str) -> int:
    networks = checkpoint.open_checkpoint(source)
    adapter = networks[0].part == "adapter"
    if form not in FORMATS:
        raise UserError(f"--format {form}: cannot be written yet; choose {' or '.join(FORMATS)}")
    if adapter != (form == "peft"):
        raise UserError(
            f"--format {form}: {source} is {'an adapter' if adapter else 'a pipeline'}; "
            f"choose {'peft' if adapter else 'diffusers'}"
        )
    if adapter:
        checkpoint.write_adapter(networks[0], destination)
    else:
        found = pipeline_kind(source, networks, None)
        checkpoint.write_pipeline(networks, destination, "diffusers", found)
    print(f"wrote {destination}")
    return 0


def takes_control(transformer: Network) -> bool:
    """Whether it has VACE blocks."""
    return transformer.values.get("vace_layers") is not None


def pipeline_kind(source: Path, networks: Sequence[Network], asked: str | None) -> str:
    """The kind of a whole pipeline, which `asked` may narrow from wan to phantom."""
    if len(networks) == 1:
        raise UserError(f"{source}: is a single {networks[0].part}; give the pipeline folder that it belongs to")
    found = checkpoint.kind(source, takes_control(networks[0]))
    if asked is not None and (asked == "vace") != (found == "vace"):
        raise UserError(f"--as {asked}: the transformer of {source} is {found}; leave it out")
    return asked or found


def parser() -> Parser:
    top = Parser(prog="idgrpo-convert", description="Published checkpoints in and out, bit for bit.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("inspect", help="what a checkpoint is and whether it is whole")
    one.add_argument("path", type=Path)
    two = commands.add_parser("verify", help="compare two checkpoints of any layouts tensor by tensor")
    two.add_argument("left", type=Path)
    two.add_argument("right", type=Path)
    into = commands.add_parser(
        "import", help="a diffusers folder into the project's store, any adapter into PEFT's form"
    )
    out = commands.add_parser("export", help="the store or a pipeline to diffusers, an adapter to PEFT")
    for command in (into, out):
        command.add_argument("source", type=Path)
        command.add_argument("destination", type=Path)
    into.add_argument(
        "--as", dest="kind", choices=checkpoint.KINDS, help="phantom has plain Wan's tensors: say so here"
    )
    out.add_argument("--format", dest="form", required=True, metavar="|".join(FORMATS))
    return top


def run(words: Sequence[str]) -> int:
    """Run the command; -> exit status. UserError for a user's mistake."""
    arguments = parser().parse_args(words)
    if arguments.command == "inspect":
        return run_inspect(arguments.path)
    if arguments.command == "verify":
        return run_verify(arguments.left, arguments.right)
    if arguments.command == "import":
        return run_import(arguments.source, arguments.destination, arguments.kind)
    return run_export(arguments.source, arguments.destination, arguments.form)


def main() -> None:
    """Entry point of `idgrpo-convert`."""
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        print(f"idgrpo-convert: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
