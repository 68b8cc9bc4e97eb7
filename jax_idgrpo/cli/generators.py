"""Define the commands of `idgrpo` that make data: synthetic prompts and preference pairs."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from jax_idgrpo.workdir import local_path


def _path(option: str) -> Callable[[str], Path]:
    """Make a parser for an option that takes a path on this machine."""
    return functools.partial(local_path, what=option)


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


def draw_prompts_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `draw-prompts`."""
    _generator_options(parser, "prompts.csv and PNG portraits", "rows of prompts.csv")
    parser.add_argument(
        "--photos",
        type=int,
        default=1,
        metavar="N",
        help="portraits of every person; further ones are in the column more_paths (default 1)",
    )


def draw_prompts(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Write prompts and portraits of synthetic people."""
    from jax_idgrpo.synthetic.captions import write_prompts

    write_prompts(**vars(arguments))


def pairs_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pairs`."""
    _generator_options(parser, "pairs.csv, mp4 and PNG files", "pairs")
    unset = argparse.SUPPRESS  # omitted options keep the defaults of `write_pairs`
    parser.add_argument(
        "--distortions",
        default=unset,
        metavar="A,B",
        help="faults to draw, joined by commas (default all)",
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
        help="frames per second to sample from --clips (default 8)",
    )


def pairs(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Write preference pairs."""
    from jax_idgrpo.preferences.clip_pairs import Shape
    from jax_idgrpo.preferences.synthesis import write_pairs

    values = vars(arguments)
    shape = {name: values.pop(name) for name in ("frames", "size", "fps") if name in values}
    if "size" in shape:
        shape["size"] = tuple(shape["size"])
    write_pairs(**values, shape=Shape(**shape))


def pack_pairs_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pack-pairs`."""
    parser.add_argument(
        "--csv", type=_path("--csv"), required=True, help="the pairs, as `idgrpo pairs` writes them"
    )
    parser.add_argument(
        "--out", type=_path("--out"), required=True, metavar="DIR", help="folder to make"
    )
    parser.add_argument(
        "--dimensions", default="SA", help="columns with labels, joined by commas (default SA)"
    )


def pack_pairs(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Pack the pairs of a CSV."""
    from jax_idgrpo.preferences.tfds_source import write_dataset

    write_dataset(**vars(arguments))
