"""Define `idgrpo pool`, which makes videos from several sources and pairs them."""

import argparse
import json
import math

from jax_idgrpo import config as configuration
from jax_idgrpo.cli.paths import adapters, existing, prompts_path, start_runtime
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import require_writable

BASE = "base"


def pool_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pool`."""
    add = parser.add_argument
    add(
        "config",
        metavar="CONFIG",
        help="a recipe, such as quickstart, or a Python file with get_config(); its model makes the "
        "videos, and its reward scores them",
    )
    add("--prompts", required=True, metavar="CSV", help="prompts: header ref_paths,prompt")
    add("--out", required=True, metavar="DIR", help="folder for videos/, pool.jsonl and pairs.csv")
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter that makes videos; `base` is the model without one; may be given several "
        "times (default base)",
    )
    add(
        "--clips",
        metavar="CSV",
        help="clips.csv of real clips; those with the text of a prompt join its videos",
    )
    add(
        "--still",
        action="store_true",
        help="add the photo held still as a video, for prompts with one person; it teaches stillness "
        "unless --slack allows it for motion alone",
    )
    add(
        "--terms",
        default='{"reward": 1}',
        metavar="JSON",
        help="terms that a winner must be better in and their weights, such as "
        '{"reward": 1, "motion": 0.5}; the sign is the direction',
    )
    add(
        "--slack",
        default="{}",
        metavar="JSON",
        help='spreads of a term by which a winner may be worse, such as {"motion": 0.5}',
    )
    add("--margin", type=float, default=0.0, help="least weighted gap of a pair, in spreads")


def pool(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Make and score videos of several sources, and pair them."""
    config = configuration.load(arguments.config, overrides)
    prompts = prompts_path(arguments.prompts)
    wanted = list(dict.fromkeys(arguments.model)) or [BASE]
    tuned = adapters([name for name in wanted if name != BASE])
    models = {**dict.fromkeys([BASE] if BASE in wanted else []), **tuned}
    for name in ("clip", "still"):
        if name in models:
            raise UserError(
                f"--model {name}=...: the name {name} is of other videos; choose another"
            )
    clips = existing(arguments.clips, "--clips", "pass a clips.csv") if arguments.clips else None
    terms = _numbers(arguments.terms, "--terms")
    slack = _numbers(arguments.slack, "--slack")
    if not any(terms.values()):
        raise UserError('--terms weighs no term; name some as JSON, such as {"reward": 1}')
    for name, value in slack.items():
        if name not in terms or value < 0:
            raise UserError(f"--slack {name}: {value:g}; name a term of --terms, and use 0 or more")
    if not 0 <= arguments.margin < math.inf:
        raise UserError(f"--margin is {arguments.margin}; use 0 or more")
    out = require_writable(arguments.out, "--out")
    start_runtime()
    from jax_idgrpo.preferences.pool import Rule, make_pool

    rule = Rule(terms, slack, arguments.margin)
    make_pool(config, prompts, out, models, clips, arguments.still, rule)


def _numbers(text: str, option: str) -> dict[str, float]:
    """Parse a JSON object of numbers.

    Raises:
      UserError: it is something else.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values.values()
    ):
        raise UserError(f'{option} {text}: write numbers by name as JSON, such as {{"reward": 1}}')
    return {name: float(value) for name, value in values.items()}
