"""Define `idgrpo describe`, which adds descriptions of the people to prompts."""

import argparse

from jax_idgrpo.cli.paths import existing, prompts_path, start_runtime
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import require_writable


def describe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `describe`."""
    add = parser.add_argument
    add("--prompts", required=True, metavar="CSV", help="prompts: header ref_paths,prompt")
    add(
        "--out",
        required=True,
        metavar="CSV",
        help="the completed prompts; the original ones are in its column prompt_before",
    )
    add(
        "--describer",
        metavar="FOLDER",
        help="folder of a published Qwen2.5-VL, such as Qwen2.5-VL-3B-Instruct, which describes the photos",
    )
    add(
        "--words",
        metavar="CSV",
        help="descriptions from elsewhere: header photo,words; photo is relative to this CSV",
    )


def describe(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Add descriptions of the people to prompts."""
    prompts = prompts_path(arguments.prompts)
    if bool(arguments.describer) == bool(arguments.words):
        raise UserError("pass --describer FOLDER or --words CSV, one of them")
    out = require_writable(arguments.out, "--out", folder=False)
    from jax_idgrpo.data.completion import complete_csv, read_words

    if arguments.words:
        words = existing(arguments.words, "--words", "pass a CSV with the header photo,words")
        summary = complete_csv(prompts, out, lambda listed: read_words(words, listed))
    else:
        folder = existing(arguments.describer, "--describer", "pass a folder of Qwen2.5-VL")
        start_runtime()
        from jax_idgrpo.rewards.vlm.describer import describe_prompts

        summary = complete_csv(prompts, out, lambda listed: describe_prompts(folder, listed))
    print(f"{out}: {summary}")
