"""Every command that README and docs show for a recipe builds its configuration."""

import re
import shlex
import warnings

import pytest

from jax_idgrpo import config
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def recipe(name):
    """The file that CONFIG means: a path, or the name of a file in configs."""
    return ROOT / name if name.endswith(".py") else ROOT / "configs" / f"{name}.py"


def commands():
    """(page, words) of the commands in code blocks that name a recipe of this repository."""
    found = []
    for page in PAGES:
        parts = re.split(
            r"^ *```.*$", page.read_text(), flags=re.MULTILINE
        )  # every second one is in a block
        for block in parts[1::2]:
            for line in block.replace("\\\n", " ").splitlines():
                words = (
                    shlex.split(line.removeprefix("$ "), comments=True)
                    if line.lstrip("$ ").startswith("idgrpo ")
                    else []
                )
                if len(words) > 2 and recipe(words[2]).is_file():
                    found.append((page.name, words))
    return found


@pytest.mark.parametrize(
    ("page", "words"),
    commands(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:3]),
)
def test_a_command_of_the_documentation_is_accepted(page, words):
    options = []
    for name, value in zip(words, [*words[1:], ""]):
        field, given, inline = name.removeprefix("--").partition("=")
        if name.startswith("--") and "." in field:
            options.append((field, inline if given else value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config.load(recipe(words[2]), options)


def test_the_documentation_shows_commands():
    assert {page for page, _ in commands()} >= {"README.md", "scaling.md"}


def test_a_model_that_films_is_shown_with_face_networks_or_another_reward():
    """The networks of the package know synthetic people only, and published recipes hold a placeholder."""
    shown = [words for _, words in commands() if "_1_3b" in words[2] or "_14b" in words[2]]
    training = [words for words in shown if words[1] == "train"]
    assert training
    for words in training:
        assert any(
            name.startswith(
                ("--reward.faces", "--reward.backend", "--reward.vlm", "--reward.custom")
            )
            for name in words
        ), words
