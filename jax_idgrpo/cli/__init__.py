"""The `idgrpo` command: parse the line, run one sub-command, report a user's mistake in one line.

`idgrpo COMMAND CONFIG.py [--option VALUE ...] [--section.field VALUE ...]`. A name with a dot sets
a field of the configuration. Both `--name VALUE` and `--name=VALUE` are accepted.
"""

import argparse
import errno
import importlib.metadata
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from checkpoints_convert.arguments import Parser
from jax_idgrpo import config as configuration
from jax_idgrpo.cli.commands import COMMANDS
from jax_idgrpo.errors import Failure, UserError, closest

# Errors of the machine that the user can resolve: no permission, a read-only or full disk, a file
# where a folder should be.
_MACHINE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split arguments into those without configuration fields and `(section.field, text)` pairs.

    Raises:
      UserError: a field has no value or is given twice.
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
            "Reinforcement learning that preserves the identity of every person in a video.",
            "",
            *lines,
            "",
            "idgrpo COMMAND --help lists a command's options and the fields of a configuration.",
        ]
    )


def run(arguments: Sequence[str]) -> None:
    """Run `idgrpo` with `arguments`, the words after the program's name.

    Raises:
      UserError: the user made a mistake.
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
            f"unknown command {name!r}{closest(name, list(COMMANDS))} (commands: "
            f"{', '.join(COMMANDS)})"
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
            f"idgrpo {name} takes no --{overrides[0][0]}: it reads no configuration; see idgrpo "
            f"{name} --help"
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
    """Run the `idgrpo` program.

    Exit status: 0 done, 1 not all could be done, 2 a user's mistake, 130 interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Share of a GPU's memory; `plan` assumes it. JAX's default is 0.75.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    # `plan` compiles for other machines, and such programs cannot be read back on this one.
    planning = sys.argv[1:2] == ["plan"]
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
            f"idgrpo: {error.filename or 'disk'}: {error.strerror}; free space or choose another "
            "path",
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
            "idgrpo: this process stops, and with it the run: the error above is its own, or that "
            "of a process that was lost (see its log); run the same command again to go on from "
            "the last checkpoint",
            file=sys.stderr,
        )
        _leave(1)


def programs_folder(environment: Mapping[str, str]) -> Path | None:
    """Return the folder that caches compiled programs, in the user's cache folder.

    None when the folder cannot be written.
    """
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
    """Return whether this is one of several processes of a run."""
    distributed = sys.modules.get("jax_idgrpo.parallel.hosts")
    return distributed is not None and distributed.is_distributed()


def _leave(status: int | str | None) -> NoReturn:
    """Exit with `status`; with several processes and a failure, without waiting for the others."""
    if status and _together():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)
