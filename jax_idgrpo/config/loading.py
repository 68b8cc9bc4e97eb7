"""Load a configuration from a recipe, apply options to it, and describe its fields for `--help`."""

import dataclasses
import json
import runpy
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from jax_idgrpo.config.root import Config
from jax_idgrpo.errors import UserError, closest
from jax_idgrpo.workdir import local_path

RECIPES = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "configs")
"""Folders of the recipes: of an installed package, and of the repository."""

ADAPTER_OPTIONS = ("model.rank", "model.alpha", "model.lora_")
"""Beginnings of the names of options that describe a trained adapter."""


def _parse(name: str, text: str, kind: Any) -> Any:
    """Parse `text` as a value of type `kind`; `name` is the field's, for messages."""
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--{name}: {text!r} is not true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"--{name}: {text!r} is not a number of type {kind.__name__}") from None
    if kind is str:
        return text
    if kind == float | None:
        return None if text.lower() in ("none", "null") else _parse(name, text, float)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UserError(f"--{name}: {text!r} is not JSON") from None


def override(config: Config, overrides: list[tuple[str, str]]) -> Config:
    """Apply `("section.field", "text")` pairs to a configuration and check it again.

    Raises:
      UserError: an unknown section or field (with the closest name), or a value of another type.
    """
    known = {
        f"{section}.{field.name}": (section, field.name, get_type_hints(schema)[field.name])
        for section, schema in get_type_hints(Config).items()
        for field in dataclasses.fields(schema)
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, text in overrides:
        if name not in known:
            raise UserError(f"unknown option --{name}{closest(name, list(known))}")
        section, field, kind = known[name]
        sections.setdefault(section, {})[field] = _parse(name, text, kind)
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    _refuse_ineffective(dataclasses.replace(config, **changed), {name for name, _ in overrides})
    return _turned(dataclasses.replace(config, **changed), {name for name, _ in overrides})


def _refuse_ineffective(config: Config, given: set[str]) -> None:
    """Refuse options of an adapter for a run that trains none. Recipes set them for both.

    Args:
      config: the configuration with the options applied.
      given: names of the options.

    Raises:
      UserError: names the option.
    """
    for name in sorted(given):
        if config.model.train == "full" and name.startswith(ADAPTER_OPTIONS):
            raise UserError(f"--{name}: model.train full trains no adapter; leave it out")


def _turned(config: Config, given: set[str]) -> Config:
    """Swap the evaluation's height and width, with a warning, if options swapped the videos'.

    Args:
      config: the configuration with the options applied.
      given: names of the options; `evaluate.height` or `evaluate.width` among them keep the size.
    """
    video, evaluate = config.video, config.evaluate
    fixed = min(evaluate.height, evaluate.width) > 0
    against = (video.height - video.width) * (evaluate.height - evaluate.width) < 0
    turns = given & {"video.height", "video.width"}
    keeps = given & {"evaluate.height", "evaluate.width"}
    if not (fixed and against and turns) or keeps:
        return config
    turned = dataclasses.replace(evaluate, height=evaluate.width, width=evaluate.height)
    warnings.warn(
        f"evaluate.height is {turned.height} and evaluate.width {turned.width}, turned as "
        f"video.height {video.height} and video.width {video.width} are; pass --evaluate.height "
        f"{evaluate.height} --evaluate.width {evaluate.width} to keep them",
        stacklevel=3,
    )
    return dataclasses.replace(config, evaluate=turned)


def recipes() -> dict[str, Path]:
    """Return the recipes that can be named without a path."""
    folder = next((folder for folder in RECIPES if folder.is_dir()), None)
    files = sorted(folder.glob("*.py")) if folder else []
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def _recipe(path: str | Path) -> Path:
    """Find the file of a path or of the name of a recipe.

    Raises:
      UserError: there is neither.
    """
    file = local_path(path, "config")
    if file.is_file():
        return file
    known = recipes()
    if str(path) in known:
        return known[str(path)]
    near = (
        closest(str(path), list(known))
        if known and file.parent == Path(".") and not file.suffix
        else ""
    )
    raise UserError(
        f"config {path}: no such file or recipe{near}; pass a Python file with get_config(), such "
        f"as configs/quickstart.py, or a recipe: {', '.join(known)}"
    )


def load(path: str | Path, overrides: list[tuple[str, str]] | None = None) -> Config:
    """Read a configuration file or a recipe and apply overrides.

    The file is a Python file that defines `get_config()`; it may import its neighbours.

    Raises:
      UserError: the file is missing or cannot be run, defines no `get_config`, or holds a value
        that is refused.
    """
    path = _recipe(path)
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except KeyError:
        raise UserError(f"config {path}: defines no get_config()") from None
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(config, Config):
        raise UserError(
            f"config {path}: get_config() returned {type(config).__name__}, "
            "not a jax_idgrpo.config.Config"
        )
    return override(config, overrides or [])


def field_names() -> list[str]:
    """Return the names `section.field` of all fields."""
    return [
        f"{section}.{field.name}"
        for section, schema in get_type_hints(Config).items()
        for field in dataclasses.fields(schema)
    ]


def describe(width: int = 100) -> Iterator[str]:
    """Yield the lines of `--help` on each field: its default, description and choices."""
    for section, schema in get_type_hints(Config).items():
        yield ""
        yield f"{section}: {(schema.__doc__ or '').splitlines()[0]}"
        for field in dataclasses.fields(schema):
            default = {} if field.default is dataclasses.MISSING else field.default
            choices = field.metadata["choices"]
            shown = json.dumps(default) if isinstance(default, str) else str(default)
            if len(shown) > 40:
                shown = f"{shown[:36]}..."
            text = field.metadata["help"]
            if choices:
                text += f" [{', '.join(choices)}]"
            yield f"  --{section}.{field.name}  (default {shown})"
            yield from textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
