"""Declared dependencies are the imported ones, so that `pip install` gets what runs, and no more."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import jax_idgrpo

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("jax_idgrpo", "checkpoints_convert")
OTHER_NAMES = {"PIL": "pillow", "orbax": "orbax-checkpoint"}  # imported name -> distribution


def distribution(name: str) -> str:
    """The form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(lines: list[str]) -> set[str]:
    return {distribution(Requirement(line).name) for line in lines}


def imported() -> dict[str, str]:
    """Every third-party distribution that the packages import, with a file that imports it."""
    found: dict[str, str] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name not in PACKAGES:
                    found[distribution(OTHER_NAMES.get(name, name))] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_declared():
    extras = {
        name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "test"
    }
    known = declared(PROJECT["dependencies"]).union(*map(declared, extras.values()))
    assert {name: file for name, file in imported().items() if name not in known} == {}


def test_every_dependency_is_imported():
    assert declared(PROJECT["dependencies"]) - set(imported()) == set()


def test_the_version_is_that_of_the_project():
    assert jax_idgrpo.__version__ == PROJECT["version"] == importlib.metadata.version("jax-idgrpo")
