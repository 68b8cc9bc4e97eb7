"""Define `idgrpo annotate`, which labels pairs of videos by a reward or by people."""

import argparse

from jax_idgrpo import config as configuration
from jax_idgrpo.cli.paths import existing, prompts_path, start_runtime
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import require_writable

PAGE_ONLY = ("pairs", "gold", "overlap", "choose", "one_at_a_time", "host", "port")
REWARD_ONLY = ("margin", "ties", "second")
DEFAULTS = {
    "margin": 0.25,
    "ties": 0.2,
    "overlap": 0.2,
    "choose": "random",
    "one_at_a_time": False,
    "host": "127.0.0.1",
    "port": 0,
}


def annotate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `annotate`."""
    add = parser.add_argument
    add(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a recipe, such as quickstart, or a Python file with get_config(); its reward is the "
        "annotator; none with --page",
    )
    add(
        "--videos",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders of videos, such as those of `idgrpo sample`; one folder per model",
    )
    add("--prompts", metavar="CSV", help="the prompts that the videos were made from")
    add(
        "--out",
        required=True,
        metavar="PATH",
        help="CSV of labelled pairs; with --page, a folder for labels.jsonl and pairs.csv",
    )
    add(
        "--dimensions",
        default="SA",
        metavar="A,B",
        help="columns of labels (default SA); by a reward, SA is the reward and others are terms of "
        "the scores",
    )
    add(
        "--pairs-per-prompt",
        type=int,
        default=0,
        metavar="K",
        help="pairs of one prompt; by a reward, half of them have the largest and half the smallest "
        "differences; 0 = all",
    )
    reward = parser.add_argument_group("labels by a reward")
    reward.add_argument(
        "--margin",
        type=float,
        help="difference below which a pair is a tie, in standard deviations (default 0.25); rewards "
        "in log-odds have their own",
    )
    reward.add_argument(
        "--ties",
        type=float,
        help="largest share of pairs that are ties in every dimension (default 0.2)",
    )
    reward.add_argument(
        "--second", metavar="CONFIG", help="second annotator; a label is kept where both agree"
    )
    page = parser.add_argument_group("labels by people")
    page.add_argument(
        "--page", action="store_true", help="serve a page on which people label the pairs"
    )
    page.add_argument(
        "--pairs", metavar="CSV", help="pairs to label, instead of --videos and --prompts"
    )
    page.add_argument(
        "--gold", metavar="CSV", help="pairs with known answers, which check the annotators"
    )
    page.add_argument(
        "--overlap",
        type=float,
        help="share of the pairs that every annotator labels (default 0.2); each other pair has one",
    )
    page.add_argument(
        "--choose",
        choices=("random", "uncertain", "disagreement"),
        help="order of the pairs: random (default); where the reward that made the CSV is least sure; "
        "or where its dimensions contradict each other",
    )
    page.add_argument(
        "--one-at-a-time",
        action="store_true",
        default=None,
        help="ask all pairs about one dimension before the next, instead of all dimensions of a pair",
    )
    page.add_argument("--host", help="address to listen on (default 127.0.0.1, this machine alone)")
    page.add_argument("--port", type=int, metavar="P", help="port (default 0, a free one)")


def annotate(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Label pairs of videos."""
    foreign = REWARD_ONLY if arguments.page else PAGE_ONLY
    for name in foreign:
        if getattr(arguments, name) is not None:
            kind = "labels by a reward" if arguments.page else "--page"
            raise UserError(f"--{name.replace('_', '-')} is for {kind}; leave it out")
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    dimensions = [name.strip() for name in arguments.dimensions.split(",")]
    if arguments.page:
        _by_people(arguments, overrides, dimensions)
    else:
        _by_reward(arguments, overrides, dimensions)


def _by_reward(
    arguments: argparse.Namespace, overrides: list[tuple[str, str]], dimensions: list[str]
) -> None:
    if not arguments.config:
        raise UserError("pass CONFIG, whose reward is the annotator, or --page to label by hand")
    if not (arguments.videos and arguments.prompts):
        raise UserError("pass --videos DIR and the --prompts CSV that they were made from")
    config = configuration.load(arguments.config, overrides)
    second = configuration.load(arguments.second, []) if arguments.second else None
    videos = [existing(path, "--videos", "pass a folder of videos") for path in arguments.videos]
    prompts = prompts_path(arguments.prompts)
    out = require_writable(arguments.out, "--out", folder=False)
    start_runtime()
    from jax_idgrpo.preferences.annotate import annotate

    annotate(
        config,
        videos,
        prompts,
        out,
        dimensions,
        arguments.pairs_per_prompt,
        arguments.margin,
        arguments.ties,
        second,
    )


def _by_people(
    arguments: argparse.Namespace, overrides: list[tuple[str, str]], dimensions: list[str]
) -> None:
    if arguments.config or overrides:
        raise UserError("--page reads no configuration; leave out CONFIG and its fields")
    if bool(arguments.pairs) == bool(arguments.videos and arguments.prompts):
        raise UserError("pass --pairs CSV, or --videos DIR and --prompts CSV")
    folder = require_writable(arguments.out, "--out")
    from jax_idgrpo.preferences.label_server import label_pairs

    if arguments.pairs:
        pairs = existing(arguments.pairs, "--pairs", "pass a CSV of pairs")
    else:
        from jax_idgrpo.preferences.annotate import write_unlabelled

        videos = [
            existing(path, "--videos", "pass a folder of videos") for path in arguments.videos
        ]
        pairs = folder / "unlabelled.csv"
        write_unlabelled(videos, prompts_path(arguments.prompts), pairs, arguments.pairs_per_prompt)
    gold = existing(arguments.gold, "--gold", "pass a CSV of pairs") if arguments.gold else None
    label_pairs(
        pairs,
        folder,
        dimensions,
        gold,
        arguments.choose,
        arguments.overlap,
        arguments.one_at_a_time,
        arguments.host,
        arguments.port,
    )
