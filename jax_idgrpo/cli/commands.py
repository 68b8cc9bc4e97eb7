"""Define the sub-commands of `idgrpo`: their options, and the functions that they call.

Networks are imported inside the functions, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

from jax_idgrpo import config as configuration
from jax_idgrpo.cli import annotation, describing, generators, ingesting, pooling
from jax_idgrpo.cli.paths import (
    adapter_sum,
    adapters,
    base_loras,
    checkpoints,
    existing,
    prompts_path,
    start_runtime,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import require_writable


@dataclasses.dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
      summary: one line for `--help`.
      options: adds the options of the command to a parser.
      run: runs the command with the parsed options and the overrides of the configuration.
      configured: whether the command reads a configuration.
    """

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[tuple[str, str]]], None]
    configured: bool = True


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config()",
    )


def _train_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="W",
        help="folder of the run; an existing run in it is continued",
    )


def _grpo_options(parser: argparse.ArgumentParser) -> None:
    _train_options(parser)
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="folder for a trace of the second and third step, and the seconds of each phase",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="adapter that is merged into the frozen base; may be given several times",
    )


def _train(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    if arguments.lora:
        if "model.base_loras" in dict(overrides):
            raise UserError("--lora and --model.base_loras are the same; give one of them")
        merged = json.dumps(base_loras(arguments.lora))
        overrides = [*overrides, ("model.base_loras", merged)]
    config = configuration.load(arguments.config, overrides)
    workdir = require_writable(arguments.workdir, "--workdir")
    profile = require_writable(arguments.profile, "--profile") if arguments.profile else None
    start_runtime()
    from jax_idgrpo.training.train import train

    train(config, workdir, profile)


def _finetune(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    workdir = require_writable(arguments.workdir, "--workdir")
    start_runtime()
    from jax_idgrpo.training.finetune import finetune

    finetune(config, workdir)


def _train_reward(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    if config.finetune.task not in configuration.REWARD_TASKS:
        raise UserError(
            f"finetune.task is {config.finetune.task!r}; train-reward trains "
            f"{', '.join(configuration.REWARD_TASKS)}, as configs/reward_face.py does; use idgrpo "
            "finetune for other tasks"
        )
    workdir = require_writable(arguments.workdir, "--workdir")
    start_runtime()
    from jax_idgrpo.training.finetune import finetune

    finetune(config, workdir)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
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
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="adapter to sample with, at a strength; several are added; without it the base model",
    )
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="make N videos from different noise for each that is written, and keep the one with the "
        "highest reward (default 1: no reward is loaded)",
    )


def _sample(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts)
    lora = adapter_sum(arguments.lora)
    out = require_writable(arguments.out, "--out")
    if arguments.best_of < 1:
        raise UserError(f"--best-of is {arguments.best_of}; use 1 or more")
    start_runtime()
    from jax_idgrpo.evaluation.commands import sample

    sample(config, prompts, out, lora, arguments.best_of)


def _score_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--videos",
        required=True,
        metavar="DIR",
        help="a video, or a folder of videos as `idgrpo sample` writes it; videos from elsewhere "
        "are named ROW-NUMBER, such as 0000-0.mp4, or in a column `video` of the CSV",
    )
    parser.add_argument("--prompts", metavar="CSV", help="prompts of the videos")
    parser.add_argument(
        "--benchmark",
        nargs=2,
        metavar=("NAME", "FOLDER"),
        help="prompts of a public benchmark instead of a CSV; NAME is opens2v, FOLDER holds "
        "Open-Domain_Eval.json and Images, or is one of its JSON files",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="JSON lines, one row per video; default: scores.jsonl in the report",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="folder for index.html, which shows the faces of every person frame by frame, "
        "scores.csv and people.csv",
    )


def _score(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    if bool(arguments.benchmark) == bool(arguments.prompts):
        raise UserError("pass --prompts CSV or --benchmark opens2v FOLDER, one of them")
    if not (arguments.out or arguments.report):
        raise UserError("pass --report DIR for a page and tables, or --out FILE for JSON lines")
    if arguments.benchmark:
        name, place = arguments.benchmark
        if name != "opens2v":
            raise UserError(f"--benchmark {name}: no such benchmark; use opens2v")
        if not arguments.report:
            raise UserError("--benchmark opens2v: needs a folder for its table; pass --report DIR")
        prompts = existing(place, "--benchmark opens2v", "pass the folder of OpenS2V-Eval")
    else:
        prompts = prompts_path(arguments.prompts)
    videos = existing(arguments.videos, "--videos", "pass a folder of videos")
    report = require_writable(arguments.report, "--report") if arguments.report else None
    lines = arguments.out or f"{arguments.report}/scores.jsonl"
    out = require_writable(lines, "--out", folder=False)
    start_runtime()
    from jax_idgrpo.evaluation.commands import score

    if report is None:
        score(config, videos, prompts, out)
    else:
        score(config, videos, prompts, out, report, bool(arguments.benchmark))


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
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
        metavar="NAME=PATH[:SCALE]",
        help="adapters to compare with the base; those of one name are added",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="checkpoints of the same model to compare with the base, such as the export of a run "
        "with model.train full",
    )


def _evaluate(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts or config.evaluate.prompts)
    loras = adapters(arguments.lora)
    others = checkpoints(arguments.checkpoint, loras)
    out = require_writable(arguments.out, "--out")
    start_runtime()
    from jax_idgrpo.evaluation.commands import evaluate

    evaluate(config, prompts, out, loras, others)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--port", type=int, required=True, metavar="P", help="port to listen on; 0 = a free one"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; the default is this machine's own, which no other can reach",
    )
    parser.add_argument(
        "--prompts",
        metavar="CSV",
        help="photos of prompts that clients send without photos, as verl-omni's and flow_grpo's do",
    )


def _serve(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts) if arguments.prompts else None
    from jax_idgrpo.parallel.hosts import trim_heap_after_compile
    from jax_idgrpo.rewards.serve import serve

    trim_heap_after_compile()
    serve(config, arguments.host, arguments.port, prompts)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run of `idgrpo train`")


def _report(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    workdir = existing(arguments.workdir, "workdir", "pass the --workdir of a run")
    from jax_idgrpo.evaluation.report import report

    print(f"report: {report(require_writable(workdir, 'workdir'))}")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _config_option(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="a slice such as v5e:4x4, v6e:8x8 or v5p:4x4x4; GPUs such as h200:8 or h100:4x8; "
        "cpu:8; or gpu, this machine's",
    )
    parser.add_argument(
        "--sizes",
        metavar="S",
        help="published sizes, 1.3b, 14b or a14b (two transformers), for a checkpoint that is not on this machine",
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="programs to plan, such as rollout update; default: all",
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
        "GRPO on a video model with a face reward; continues an existing run in the workdir",
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
    "score": Command(
        "the reward of existing videos of any model, with a page that shows the faces",
        _score_options,
        _score,
    ),
    "describe": Command(
        "prompts that describe the people of their photos, by a Qwen2.5-VL or your own words",
        describing.describe_options,
        describing.describe,
        configured=False,
    ),
    "annotate": Command(
        "label pairs of videos, by a reward or by people on a local web page",
        annotation.annotate_options,
        annotation.annotate,
    ),
    "pool": Command(
        "videos of several models and real clips for the same prompts, and pairs of them",
        pooling.pool_options,
        pooling.pool,
    ),
    "evaluate": Command(
        "base against adapters or checkpoints on held-out prompts, with bootstrap intervals",
        _evaluate_options,
        _evaluate,
    ),
    "plan": Command(
        "memory, work and time per chip of any machine, from the real compiler",
        _plan_options,
        _plan,
    ),
    "serve-reward": Command(
        "score the videos of other processes over HTTP, for reward.backend http://...",
        _serve_options,
        _serve,
    ),
    "report": Command(
        "one HTML page of a run: curves, videos side by side, table, configuration",
        _report_options,
        _report,
        configured=False,
    ),
    "ingest": Command(
        "clips of people with reference photos, from films",
        ingesting.ingest_options,
        ingesting.ingest,
        configured=False,
    ),
    "pairs": Command(
        "preference pairs with known labels, of synthetic people or your own clips",
        generators.pairs_options,
        generators.pairs,
        configured=False,
    ),
    "pack-pairs": Command(
        "pack the pairs of a CSV into one data set of few large files",
        generators.pack_pairs_options,
        generators.pack_pairs,
        configured=False,
    ),
    "draw-prompts": Command(
        "prompts and reference photos of synthetic people",
        generators.draw_prompts_options,
        generators.draw_prompts,
        configured=False,
    ),
}
