"""The `idgrpo` command: parse the line, call one function per sub-command, turn a user's mistake into one line and exit status 2.

`idgrpo COMMAND CONFIG.py [--option VALUE ...] [--section.field VALUE ...]`. A name with a dot sets a field of the configuration; both
`--name VALUE` and `--name=VALUE` are read. Networks are imported by the sub-commands, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import errno
import functools
import importlib.metadata
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from checkpoints_convert.arguments import Parser
from checkpoints_convert.places import adapter_place, hub_remedy, is_export
from jax_idgrpo import config as configuration
from jax_idgrpo.errors import Failure, UserError, closest
from jax_idgrpo.workdir import local_path, require_writable

# Errors of the machine that the user can do something about: no permission, a read-only or full disk, a file where a folder should be.
_MACHINE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """One sub-command: its summary, what adds its options to a parser, what runs it, and whether it reads a configuration."""

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[tuple[str, str]]], None]
    configured: bool = True


def _path(option: str) -> Callable[[str], Path]:
    """Make the reader of an option that takes a path of this machine."""
    return functools.partial(local_path, what=option)


def existing(path: str, what: str, remedy: str) -> Path:
    """`path`, which must exist.

    Raises:
      UserError: it does not, or is an address; `what` names its part and `remedy` says what to pass.
    """
    if not local_path(path, what).exists():
        raise UserError(f"{what} {path}: no such file or folder; {remedy}")
    return Path(path)


def prompts_path(name: str) -> Path:
    """The CSV that `--prompts name` means, which must exist."""
    local_path(name, "--prompts")
    path = configuration.prompts_file(name)
    return existing(
        str(path), "--prompts", "pass a CSV with the header ref_paths,prompt, or embedded:eval"
    )


def adapter_path(path: str) -> Path:
    """Return the adapter that `--lora path` means, also where it is the workdir of a run.

    Raises:
      UserError: there is none.
    """
    place = local_path(path, "--lora")
    if not place.exists() and not is_export(place):
        existing(
            path,
            "--lora",
            hub_remedy(place) or "pass an adapter folder, such as runs/quickstart/export",
        )
    return adapter_place(place)


def adapters(pairs: Sequence[str]) -> dict[str, Path]:
    """`["NAME=PATH", ...]` as a dictionary.

    Raises:
      UserError: a pair without `=`, a name twice or one that is taken, or a path that does not exist.
    """
    paths: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UserError(f"--lora {pair}: not NAME=PATH, such as tuned=runs/quickstart/export")
        if name in paths or name == "base" or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                f"--lora {pair}: the name {name!r} is taken or not made of letters, digits, - and _; choose another"
            )
        paths[name] = adapter_path(path)
    return paths


def _start() -> None:
    """What comes before any work on the devices: the other processes of the run are joined, if there are any (see `parallel.hosts`)."""
    from jax_idgrpo.parallel.hosts import initialise, trim_heap_after_compile

    initialise()
    trim_heap_after_compile()


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="W",
        help="folder of the run; a run found there is continued",
    )


def _grpo_options(parser: argparse.ArgumentParser) -> None:
    _train_options(parser)
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="folder for a trace of the second and third step, and seconds by phase",
    )


def _train(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    workdir = require_writable(arguments.workdir, "--workdir")
    profile = require_writable(arguments.profile, "--profile") if arguments.profile else None
    _start()
    from jax_idgrpo.training.train import train

    train(config, workdir, profile)


def _finetune(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    workdir = require_writable(arguments.workdir, "--workdir")
    _start()
    from jax_idgrpo.training.finetune import finetune

    finetune(config, workdir)


def _train_reward(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    if config.finetune.task not in configuration.REWARD_TASKS:
        raise UserError(
            f"finetune.task is {config.finetune.task!r}; train-reward trains {', '.join(configuration.REWARD_TASKS)}, "
            "as configs/reward_face.py does; use idgrpo finetune for other tasks"
        )
    workdir = require_writable(arguments.workdir, "--workdir")
    _start()
    from jax_idgrpo.training.finetune import finetune

    finetune(config, workdir)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="CSV",
        help="prompts and reference photos: header ref_paths,prompt",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the videos and samples.jsonl"
    )
    parser.add_argument(
        "--lora", metavar="PATH", help="adapter to sample with; without it the base model"
    )


def _sample(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts)
    lora = adapter_path(arguments.lora) if arguments.lora else None
    out = require_writable(arguments.out, "--out")
    _start()
    from jax_idgrpo.evaluation.commands import sample

    sample(config, prompts, out, lora)


def _score_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )
    parser.add_argument(
        "--videos",
        required=True,
        metavar="DIR",
        help="a video, or a folder of them, as `idgrpo sample` leaves it; others are named ROW-NUMBER, such as 0000-0.mp4, "
        "or in a column `video` of the CSV",
    )
    parser.add_argument(
        "--prompts", required=True, metavar="CSV", help="the prompts that the videos were made from"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSON lines, one row per video"
    )


def _score(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts)
    videos = existing(arguments.videos, "--videos", "pass a folder of videos")
    out = require_writable(arguments.out, "--out", folder=False)
    _start()
    from jax_idgrpo.evaluation.commands import score

    score(config, videos, prompts, out)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )
    parser.add_argument(
        "--prompts",
        metavar="CSV",
        help="held-out prompts; default: evaluate.prompts of the configuration",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for metrics.json, table.md and videos/"
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="adapters to compare with the base",
    )


def _evaluate(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts or config.evaluate.prompts)
    loras = adapters(arguments.lora)
    out = require_writable(arguments.out, "--out")
    _start()
    from jax_idgrpo.evaluation.commands import evaluate

    evaluate(config, prompts, out, loras)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run, as `idgrpo train` leaves it")


def _report(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    workdir = existing(arguments.workdir, "workdir", "pass the --workdir of a run")
    from jax_idgrpo.evaluation.report import report

    print(f"report: {report(require_writable(workdir, 'workdir'))}")


def _generator_options(parser: argparse.ArgumentParser, holds: str, unit: str) -> None:
    parser.add_argument(
        "--out", type=_path("--out"), required=True, metavar="DIR", help=f"folder to make: {holds}"
    )
    parser.add_argument(
        "--split",
        required=True,
        help="synthetic people to draw from: train, rl or eval; no two share a person",
    )
    parser.add_argument("--count", type=int, required=True, metavar="N", help=unit)
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws other people and scenes (default 0)"
    )


def _draw_prompts_options(parser: argparse.ArgumentParser) -> None:
    _generator_options(parser, "prompts.csv and PNG portraits", "rows of prompts.csv")


def _draw_prompts(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from jax_idgrpo.synthetic.captions import write_prompts

    write_prompts(**vars(arguments))


def _pairs_options(parser: argparse.ArgumentParser) -> None:
    _generator_options(parser, "pairs.csv, mp4 and PNG files", "pairs")
    unset = argparse.SUPPRESS  # an option that is not given keeps the default of `write_pairs`
    parser.add_argument(
        "--distortions",
        default=unset,
        metavar="A,B",
        help="faults that occur, joined by commas (default all)",
    )
    parser.add_argument(
        "--automatic",
        type=float,
        default=unset,
        help="share of automatic pairs, with labels partly wrong (default 0)",
    )
    parser.add_argument(
        "--careless",
        type=float,
        default=unset,
        help="share of the automatic labels drawn at random (default 0.5)",
    )
    parser.add_argument(
        "--clips",
        type=_path("--clips"),
        default=unset,
        metavar="DIR",
        help="folder of videos with photos and clips.csv; without it the people are synthetic",
    )
    parser.add_argument(
        "--faces",
        type=_path("--faces"),
        default=unset,
        metavar="DIR",
        help="face networks for --clips, as reward.faces",
    )
    parser.add_argument("--frames", type=int, default=unset, help="frames per clip (default 9)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=unset,
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels (default 64 64)",
    )
    parser.add_argument(
        "--fps",
        type=int,
        default=unset,
        help="frames per second that are kept of --clips (default 8)",
    )


def _pairs(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from jax_idgrpo.preferences.clip_pairs import Shape
    from jax_idgrpo.preferences.synthesis import write_pairs

    values = vars(arguments)
    shape = {name: values.pop(name) for name in ("frames", "size", "fps") if name in values}
    if "size" in shape:
        shape["size"] = tuple(shape["size"])
    write_pairs(**values, shape=Shape(**shape))


def _pack_pairs_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--csv", type=_path("--csv"), required=True, help="the pairs, as `idgrpo pairs` writes them"
    )
    parser.add_argument(
        "--out", type=_path("--out"), required=True, metavar="DIR", help="folder to make"
    )
    parser.add_argument(
        "--dimensions", default="SA", help="columns that hold labels, joined by commas (default SA)"
    )


def _pack_pairs(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    from jax_idgrpo.preferences.tfds_source import write_dataset

    write_dataset(**vars(arguments))


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )
    slices = "a slice such as v5e:4x4, v6e:8x8 or v5p:4x4x4; GPUs such as h200:8 or h100:4x8; cpu:8; or gpu, this machine's"
    parser.add_argument("--topology", required=True, metavar="T", help=slices)
    parser.add_argument(
        "--sizes",
        metavar="S",
        help="published sizes, 1.3b or 14b, for a checkpoint that is not on this machine",
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these, such as rollout update; default: all",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="try N meshes and micro-batches, and plan the fastest that fits",
    )
    parser.add_argument(
        "--out", default="plan", metavar="DIR", help="folder for plan.json and table.md"
    )


def _plan(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    out = require_writable(arguments.out, "--out")
    from jax_idgrpo.parallel.hosts import trim_heap_after_compile
    from jax_idgrpo.planning.plan import plan

    trim_heap_after_compile()
    if not plan(
        config, arguments.topology, arguments.sizes, out, arguments.programs, arguments.search
    ):
        sys.exit(1)


COMMANDS = {
    "train": Command(
        "GRPO on a video model with a face reward; continues a run it finds in the workdir",
        _grpo_options,
        _train,
    ),
    "finetune": Command(
        "supervised training of the video model's parts and the face networks",
        _train_options,
        _finetune,
    ),
    "train-reward": Command("train a reward on preference pairs", _train_options, _train_reward),
    "sample": Command("videos from prompts and reference photos", _sample_options, _sample),
    "score": Command("the reward of existing videos", _score_options, _score),
    "evaluate": Command(
        "base against adapters on held-out prompts, with bootstrap intervals",
        _evaluate_options,
        _evaluate,
    ),
    "plan": Command(
        "memory, work and time per chip on a machine that need not be here, by the real compiler",
        _plan_options,
        _plan,
    ),
    "report": Command(
        "one HTML page of a run: curves, videos side by side, table, configuration",
        _report_options,
        _report,
        configured=False,
    ),
    "pairs": Command(
        "preference pairs with known truth, of synthetic people or your own clips",
        _pairs_options,
        _pairs,
        configured=False,
    ),
    "pack-pairs": Command(
        "one data set of few large files from the pairs of a CSV",
        _pack_pairs_options,
        _pack_pairs,
        configured=False,
    ),
    "draw-prompts": Command(
        "prompts and reference photos of synthetic people",
        _draw_prompts_options,
        _draw_prompts,
        configured=False,
    ),
}


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments without configuration fields, and the `(section.field, text)` pairs among them.

    Raises:
      UserError: a field without a value, or a field given twice.
    """
    rest: list[str] = []
    pairs: list[tuple[str, str]] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(word)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{name} needs a value, as in {name} VALUE or {name}=VALUE")
            value = queue.pop(0)
        if name.removeprefix("--") in (field for field, _ in pairs):
            raise UserError(f"{name} is given twice; give it once")
        pairs.append((name.removeprefix("--"), value))
    return rest, pairs


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: idgrpo COMMAND CONFIG.py [--option VALUE ...] [--section.field VALUE ...]",
            "",
            "Reinforcement learning that keeps every person in a generated video who they are.",
            "",
            *lines,
            "",
            "idgrpo COMMAND --help lists a command's options and the fields of a configuration.",
        ]
    )


def run(arguments: Sequence[str]) -> None:
    """Run `idgrpo` with `arguments` (the words after the program's name).

    Raises:
      UserError: what the user gave cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        print(f"jax-idgrpo {importlib.metadata.version('jax-idgrpo')}")
        return
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}{closest(name, list(COMMANDS))} (commands: {', '.join(COMMANDS)})"
        )
    command = COMMANDS[name]
    fields = [f"--{field}" for field in configuration.field_names()] if command.configured else []
    epilog = (
        "\n".join(
            [
                "Fields of the configuration; a recipe may set other defaults.",
                *configuration.describe(),
            ]
        )
        if fields
        else ""
    )
    parser = Parser(
        prog=f"idgrpo {name}",
        description=command.summary,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.options(parser)
    rest, overrides = split_overrides(arguments[1:])
    parsed, unknown = parser.parse_known_args(rest)
    if overrides and not command.configured:
        raise UserError(
            f"idgrpo {name} takes no --{overrides[0][0]}: it reads no configuration; see idgrpo {name} --help"
        )
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise UserError(f"unexpected argument {word}; see idgrpo {name} --help")
        options = [
            option for action in parser._actions for option in action.option_strings
        ] + fields
        raise UserError(f"unknown option {word}{closest(word, options)}; see idgrpo {name} --help")
    command.run(parsed, overrides)


def main() -> None:
    """Entry point of the `idgrpo` program.

    Exit status: 0 done, 1 not all could be done, 2 a user's mistake, 130 interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9"
    )  # of a GPU's memory, as `plan` counts on; JAX takes 0.75
    planning = sys.argv[1:2] == [
        "plan"
    ]  # what it compiles is for a machine that is not here, and cannot be read back without it
    if (
        "JAX_COMPILATION_CACHE_DIR" not in os.environ
        and not planning
        and (programs := programs_folder(os.environ))
    ):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"idgrpo: {' '.join(str(error).split())}", file=sys.stderr)
        _leave(2)
    except Failure as error:
        print(f"idgrpo: {' '.join(str(error).split())}", file=sys.stderr)
        _leave(1)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        print(
            f"idgrpo: {error.filename or 'disk'}: {error.strerror}; free space or choose another path",
            file=sys.stderr,
        )
        _leave(2)
    except KeyboardInterrupt:
        print("\nidgrpo: interrupted; run the same command again", file=sys.stderr)
        _leave(130)
    except SystemExit as stop:
        _leave(stop.code)
    except Exception:
        if not _together():
            raise
        traceback.print_exc()
        print(
            "idgrpo: this process stops, and with it the run: the error above is its own, or that of a process that was lost (see its "
            "log); run the same command again to go on from the last checkpoint",
            file=sys.stderr,
        )
        _leave(1)


def programs_folder(environment: Mapping[str, str]) -> Path | None:
    """Where compiled programs are kept for the next run: in the user's cache folder, or nowhere when that cannot be written."""
    home = environment.get("HOME")
    caches = environment.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else "")
    if not caches:
        return None
    folder = Path(caches) / "jax-idgrpo" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _together() -> bool:
    """Whether this is one of several processes of a run."""
    distributed = sys.modules.get("jax_idgrpo.parallel.hosts")
    return distributed is not None and distributed.is_distributed()


def _leave(status: int | str | None) -> NoReturn:
    """Exit; at once where other processes would be waited for that may never come."""
    if status and _together():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)
