"""The `idgrpo-convert` command: inspect, compare, import and export checkpoints.

Exit status: 0 done, 1 `verify` found differences, 2 a user's mistake, in one line on standard
error, 130 interrupted.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints_convert import (
    adapter,
    adapter_writing,
    card,
    checkpoint,
    compare,
    experts,
    face_folder,
    identify,
    lora,
    lora_add,
    lora_merge,
    photographs,
    quantized,
    spiece,
    writing,
)
from checkpoints_convert.arguments import Parser
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.contents import Options
from checkpoints_convert.description import SHOWN, describe
from checkpoints_convert.identify import FACE, TRANSFORMER
from checkpoints_convert.network import Network, blank_matrices, describe_blanks
from checkpoints_convert.places import adapter_place, run_config, split_scale
from checkpoints_convert.reporting import bar, check_values, print_notices, warn_of_blanks
from jax_idgrpo.config.model_kinds import MODEL_KINDS
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import local_path

PIPELINE_FORMATS: tuple[str, ...] = ("diffusers", "original")
ADAPTER_FORMATS: tuple[str, ...] = (*adapter_writing.FORMATS, "merged")
FACE_FORMATS: tuple[str, ...] = ("original",)


def options_of(arguments: argparse.Namespace) -> Options:
    """Collect what the command line states about a checkpoint."""
    return Options(
        entry=arguments.entry,
        dtype=quantized.DTYPES[getattr(arguments, "dtype", None) or quantized.DEFAULT],
        base=getattr(arguments, "rest", None),
    )


def report_unstated_alpha(opened: Checkpoint, alpha: float | None) -> None:
    """Print a line for an adapter whose alpha neither its file nor the user states."""
    if opened.adapter is not None and alpha is None and not adapter.states_alpha(opened.path):
        print(
            "adapter: its file states no alpha; taken as the rank, as the programs do that write "
            f"such names ({opened.adapter.layout}; set another with import --alpha A)"
        )


def report_left_out(opened: Checkpoint) -> None:
    """Print a line for every network with tensors that are not converted, and for a tokenizer."""
    embedded = opened.tokenizer is None and opened.tokenizer_texts
    for part, network in opened.networks.items():
        taken = [spiece.TENSOR] if embedded else []
        if extra := [name for name in network.extra if name not in taken]:
            print(
                f"{part}: left out {len(extra)} tensors that it does not have: "
                f"{', '.join(extra[:SHOWN])}"
            )
    if embedded:
        print("tokenizer: made from the SentencePiece model in the text encoder's file")


def run_inspect(path: Path, kind: str | None, options: Options) -> int:
    """Print what a checkpoint is and whether it is complete, and return the exit status.

    Args:
      path: the checkpoint.
      kind: kind of its transformer, if the user states it.
      options: what the user states about it.
    """
    opened = checkpoint.open_checkpoint(path, kind, options=options)
    if opened.kind is not None:
        print(
            f"kind: {opened.kind}"
            + (
                ", or phantom, refalign or skyreels, which have the same tensors"
                if opened.kind == "wan" and kind is None
                else ""
            )
        )
    if opened.boundary is not None:
        print(experts.description(opened.boundary))
    describe(opened)
    print_notices(opened)
    check_values(opened)
    report_unstated_alpha(opened, None)
    for part, network in opened.networks.items():
        if blanks := blank_matrices(network):
            print(f"{part}: {describe_blanks(blanks)}")
    missing = opened.missing()
    print(
        "complete: every tensor of "
        + ("the network" if len(opened.networks) == 1 else f"the {len(opened.networks)} networks")
    )
    if missing:
        print(f"not here: {', '.join(missing)}, for a whole pipeline")
    return 0


def run_verify(left: Path, right: Path, kind: str | None, options: Options) -> int:
    """Compare two checkpoints.

    Args:
      left: the first checkpoint.
      right: the second checkpoint.
      kind: kind of both transformers, if the user states it.
      options: what the user states; an entry is that of the first checkpoint.

    Returns:
      Exit status: 0 if they are equal, otherwise 1.
    """
    sides = [
        checkpoint.open_checkpoint(left, kind, options=options),
        checkpoint.open_checkpoint(right, kind, options=dataclasses.replace(options, entry=None)),
    ]
    count = 0
    if None not in (sides[0].kind, sides[1].kind) and sides[0].kind != sides[1].kind:
        print(
            f"note: the kind of {left} is {sides[0].kind}, that of {right} is {sides[1].kind}; "
            "only tensors are compared"
        )
    for line in itertools.islice(
        compare.differences(*(side.networks for side in sides)), SHOWN + 1
    ):
        count += 1
        print(line if count <= SHOWN else "...")
    if count:
        return 1
    tensors = sum(len(network.slots) for network in sides[0].networks.values())
    print(f"equal: {tensors} tensors, bit for bit")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Import a checkpoint into the project's store or an adapter into PEFT's form."""
    source, destination, kind, rest, alpha, merge = (
        getattr(arguments, name)
        for name in ("source", "destination", "kind", "rest", "alpha", "merge")
    )
    options = options_of(arguments)
    opened = checkpoint.open_checkpoint(source, kind, alpha, options)
    if alpha is not None and opened.adapter is None:
        raise UserError(f"--alpha {alpha:g}: {source} is no adapter; leave it out")
    if opened.adapter is not None:
        for option, value in (("--as", kind), ("--with", rest), ("--merge", " ".join(merge))):
            if value:
                raise UserError(
                    f"{option} {value}: {source} is an adapter, which needs none; leave it out"
                )
        report_unstated_alpha(opened, alpha)
        report_left_out(opened)
        adapter_writing.write_peft(opened.adapter, destination)
    else:
        if kind is not None and TRANSFORMER not in opened.networks:
            raise UserError(f"--as {kind}: {source} holds no transformer; leave it out")
        if rest is not None and FACE in opened.networks:
            raise UserError(
                f"--with {rest}: {source} is a face network, which needs none; leave it out"
            )
        if rest is not None:
            others = dataclasses.replace(options, entry=None, base=None)
            opened = checkpoint.completed(opened, checkpoint.open_checkpoint(rest, options=others))
        if merge and TRANSFORMER not in opened.networks:
            raise UserError(f"--merge {merge[0]}: {source} holds no transformer; leave it out")
        experts.require_one(source, opened.boundary if merge else None)
        merges = [lora_merge.open_merge(*split_scale(text, "--merge")) for text in merge]
        print_notices(opened, arguments.dtype)
        warn_of_blanks(opened)
        report_left_out(opened)
        writing.write_store(opened, destination, bar, merges)
    print(f"wrote {destination}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Export a checkpoint or an adapter to a published format."""
    form, destination = arguments.form, arguments.destination
    source = adapter_place(arguments.source)
    if pair := experts.exports_of_experts(source, destination, form):
        for one in pair:
            run_export(argparse.Namespace(**(vars(arguments) | one)))
        return 0
    options = options_of(arguments)
    opened = checkpoint.open_checkpoint(source, arguments.kind, options=options)
    what, choices = "a pipeline", PIPELINE_FORMATS
    if opened.adapter is not None:
        what, choices = "an adapter", ADAPTER_FORMATS
    elif FACE in opened.networks:
        what, choices = "a face network", FACE_FORMATS
    if form not in choices:
        raise UserError(f"--format {form}: {source} is {what}; choose {' or '.join(choices)}")
    if arguments.base is not None and form != "merged":
        raise UserError(
            f"--base {arguments.base}: only --format merged needs it; name the base model with "
            "--base-model"
        )
    parents = source.absolute().parents  # an adapter of two is one folder deeper in its workdir
    training = next(filter(None, map(run_config, parents[:2])), None)
    trained_on = (training or {}).get("model", {}).get("path") or None
    named = arguments.base_model or trained_on
    warn_of_blanks(opened)
    if opened.adapter is None:
        print_notices(opened, arguments.dtype)
        write = writing.write_diffusers if form == "diffusers" else writing.write_original
        write(opened, destination, card_of(arguments, opened, named, training, None), bar)
    elif form == "merged":
        place = arguments.base or trained_on
        if place is None:
            raise UserError(
                f"--format merged: the base model of {source} is unknown; give it with --base"
            )
        base = checkpoint.open_checkpoint(place, arguments.kind, options=options)
        experts.require_one(base.path, base.boundary)
        print_notices(base, arguments.dtype)
        warn_of_blanks(base)
        merge = lora_merge.open_merge(source)
        text = card_of(arguments, base, str(named or place), training, opened.adapter)
        writing.write_diffusers(base, destination, text, bar, merges=[merge])
    else:
        text = card_of(arguments, opened, named, training, opened.adapter)
        if form == "peft":
            values = {**opened.adapter.values, "base_model_name_or_path": named and str(named)}
            adapter_writing.write_peft(
                dataclasses.replace(opened.adapter, values=values), destination, text
            )
        else:
            adapter_writing.write_file(opened.adapter, destination, form, text)
    print(f"wrote {destination}")
    return 0


def run_faces(arguments: argparse.Namespace) -> int:
    """Make a folder of face networks."""
    files = {part: getattr(arguments, part) for part in ("detector", "embedder", "judge")}
    packaged = arguments.photographs or arguments.wheel or arguments.dat
    if packaged and (extra := [f"--{part}" for part, path in files.items() if path is not None]):
        raise UserError(
            f"{', '.join(extra)}: the networks for photographs come from packages; leave it out"
        )
    if packaged and not arguments.photographs and None in (arguments.wheel, arguments.dat):
        missing = "--dat" if arguments.dat is None else "--wheel"
        raise UserError(f"{missing} is missing; give the file, or --photographs to download it")
    if not packaged and None in (files["detector"], files["embedder"]):
        raise UserError(
            "faces needs --photographs, or --detector and --embedder; see idgrpo-convert faces "
            "--help"
        )
    if packaged:
        names = photographs.write_photographs(arguments.destination, arguments.wheel, arguments.dat)
    else:
        names = face_folder.write_folder(arguments.destination, **files)
    for part, name in names.items():
        print(f"{part}: {name}")
    print(f"wrote {arguments.destination}")
    return 0


def card_of(
    arguments: argparse.Namespace,
    base: Checkpoint,
    named: str | None,
    training: Mapping[str, object] | None,
    adapted: Network | None,
) -> str:
    """Write the model card of an export.

    Args:
      arguments: the command line.
      base: the exported checkpoint, or the base that an adapter is merged into.
      named: name or path of the base model.
      training: configuration of the run, if known.
      adapted: the adapter, if it is exported or merged.
    """
    what = dict.fromkeys(adapter_writing.FORMATS, "LoRA adapter")
    what["merged"] = "Video model with a merged adapter"
    if (face := base.networks.get(FACE)) is not None:
        title = face.values.get("name", "Face network")
        return card.render(
            card.FACE, title, named, arguments.license or card.OTHER_LICENSE, training
        )
    title = what.get(arguments.form, f"{(base.kind or 'video model').capitalize()} checkpoint")
    pipeline = writing.PIPELINE_CLASSES[base.kind or "vace"]
    scale = None if adapted is None else lora.common(adapted.config)
    license = arguments.license or MODEL_KINDS[base.kind or "vace"].license
    return card.render(arguments.form, title, named, license, training, scale, pipeline, base.notes)


def positive(text: str) -> float:
    """Parse a positive number of the command line."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def parser() -> Parser:
    """Make the parser of the command line."""
    top = Parser(prog="idgrpo-convert", description="Convert published checkpoints, bit for bit.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("inspect", help="what a checkpoint is and whether it is complete")
    one.add_argument("path", type=Path)
    two = commands.add_parser(
        "verify", help="compare two checkpoints of any layouts tensor by tensor"
    )
    two.add_argument("left", type=Path)
    two.add_argument("right", type=Path)
    into = commands.add_parser(
        "import", help="any published layout into the project's store, any adapter into PEFT's form"
    )
    out = commands.add_parser(
        "export",
        help="the store or any layout to diffusers or the original names, an adapter to its "
        "formats",
    )
    stack = commands.add_parser(
        "faces",
        help="the folder for --reward.faces, from packages or from files that the libraries "
        "download",
    )
    stack.add_argument("destination", type=Path)
    stack.add_argument(
        "--photographs",
        action="store_true",
        help="networks for photographs: YuNet, SFace and dlib's ResNet, downloaded with pip",
    )
    stack.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"with --dat: {photographs.WHEEL.file}, on a machine without an index",
    )
    dat = f"{photographs.JUDGE.name}, or the {photographs.ARCHIVE.file} that holds it"
    stack.add_argument("--dat", type=Path, metavar="FILE", help=f"with --wheel: {dat}")
    stack.add_argument(
        "--detector", type=Path, metavar="FILE", help="retinaface.pth, or YuNet in ONNX"
    )
    weights = "ArcFace, Facenet, IResNet or IR-101, or SFace in ONNX, or dlib's ResNet"
    stack.add_argument("--embedder", type=Path, metavar="FILE", help=f"weights of {weights}")
    stack.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="another embedder, which is used for evaluation but never as a reward",
    )
    plus = commands.add_parser("add", help="several adapters of one model as one PEFT adapter")
    plus.add_argument("destination", type=Path, help="folder to write")
    plus.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER[:SCALE]",
        help="adapters of any dialect, or workdirs of runs, and their strengths",
    )
    for command in (into, out):
        command.add_argument("source", type=Path)
        command.add_argument("destination", type=Path)
    for command in (one, two, into, out):
        command.add_argument(
            "--as",
            dest="kind",
            choices=identify.KINDS,
            help="kind of the transformer; phantom and refalign have plain Wan's tensors, so state it "
            "here (the store records it)",
        )
        command.add_argument(
            "--entry",
            metavar="NAME",
            help="set of weights of a file with several, such as state_dict or ema (verify: of A)",
        )
    for command in (two, into, out):
        command.add_argument(
            "--dtype",
            choices=quantized.DTYPES,
            help="dtype of weights stored in fp8, which are dequantized; default: "
            f"{quantized.DEFAULT}",
        )
    into.add_argument(
        "--with",
        dest="rest",
        type=Path,
        metavar="PATH",
        help="checkpoint with the networks and the tokenizer that SOURCE lacks, or the T2V model "
        "under the VACE blocks of SOURCE",
    )
    into.add_argument(
        "--merge",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA to merge into the transformer of SOURCE, also one with diff tensors, biases or "
        "DoRA; may be given several times",
    )
    into.add_argument(
        "--alpha",
        type=positive,
        metavar="A",
        help="alpha of an adapter whose file does not state it",
    )
    out.add_argument(
        "--format", dest="form", required=True, choices=(*PIPELINE_FORMATS, *ADAPTER_FORMATS)
    )
    out.add_argument(
        "--base", type=Path, metavar="PATH", help="with merged: the model to merge into"
    )
    out.add_argument(
        "--base-model",
        metavar="NAME",
        help="the base model as the model card names it; default: that of the run",
    )
    default = f"{card.LICENSE}, or {card.OTHER_LICENSE} for a face network or SkyReels-V3"
    out.add_argument("--license", help=f"the licence field of the model card; default: {default}")
    return top


def run(words: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Raises:
      UserError: the user made a mistake.
    """
    arguments = parser().parse_args(words)
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            local_path(value, name)
    if arguments.command == "inspect":
        return run_inspect(arguments.path, arguments.kind, options_of(arguments))
    if arguments.command == "verify":
        return run_verify(arguments.left, arguments.right, arguments.kind, options_of(arguments))
    if arguments.command == "import":
        return run_import(arguments)
    if arguments.command == "faces":
        return run_faces(arguments)
    if arguments.command == "add":
        parts = [split_scale(text, "adapter") for text in arguments.adapters]
        lora_add.write_added(parts, arguments.destination)
        print(f"wrote {arguments.destination}")
        return 0
    return run_export(arguments)


def main() -> None:
    """Run the `idgrpo-convert` program."""
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        print(f"idgrpo-convert: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(
            "idgrpo-convert: interrupted; the same command continues with the finished files",
            file=sys.stderr,
        )
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
