"""Check the paths that options name, and start the runtime of a command."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints_convert.hub import is_name
from checkpoints_convert.places import LoRASum, adapter_place, is_export, split_scale
from jax_idgrpo import config as configuration
from jax_idgrpo.errors import UserError
from jax_idgrpo.workdir import local_path


def existing(path: str, what: str, remedy: str) -> Path:
    """Return `path` if it exists.

    Args:
      path: the path as the user gave it.
      what: the option that it comes from, for the message.
      remedy: what to pass instead, for the message.

    Raises:
      UserError: the path does not exist or is an address.
    """
    if not local_path(path, what).exists():
        raise UserError(f"{what} {path}: no such file or folder; {remedy}")
    return Path(path)


def prompts_path(name: str) -> Path:
    """Return the CSV of `--prompts name`.

    Raises:
      UserError: the file does not exist.
    """
    local_path(name, "--prompts")
    path = configuration.prompts_file(name)
    return existing(
        str(path), "--prompts", "pass a CSV with the header ref_paths,prompt, or embedded:eval"
    )


def adapter_path(path: str) -> Path:
    """Return the adapter of `--lora path`, which may be the workdir of a run or a name on the Hub.

    Raises:
      UserError: there is no adapter.
    """
    place = local_path(path, "--lora")
    if not place.exists() and not is_export(place) and not is_name(place):
        existing(path, "--lora", "pass an adapter folder, such as runs/quickstart/export")
    found = adapter_place(place)
    if (found / "transformer").is_dir():
        raise UserError(
            f"--lora {path}: is a complete checkpoint, not an adapter; pass {found} as --model.path, "
            "or to evaluate as --checkpoint NAME=PATH"
        )
    return found


def adapter_sum(texts: Sequence[str]) -> Path | LoRASum | None:
    """Return the adapter of `--lora PATH[:SCALE]`, or the sum of several; None if there is none.

    Raises:
      UserError: there is no adapter at a path, or a scale is no positive number.
    """
    parts = [split_scale(text, "--lora") for text in texts]
    found = tuple((adapter_path(str(path)), scale) for path, scale in parts)
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0]
    return LoRASum(found) if found else None


def base_loras(texts: Sequence[str]) -> dict[str, float]:
    """Return the strength of every `--lora PATH[:SCALE]` of `train` by its path.

    Raises:
      UserError: as in `adapter_sum`, or a path is given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        path, scale = split_scale(text, "--lora")
        place = str(adapter_path(str(path)))
        if place in found:
            raise UserError(f"--lora {text}: is given twice; add the scales")
        found[place] = scale
    return found


def adapters(pairs: Sequence[str]) -> dict[str, Path | LoRASum]:
    """Parse `["NAME=PATH[:SCALE]", ...]` into a dictionary; paths of one name are added.

    Raises:
      UserError: a pair has no `=`, a name is reserved, or a path does not exist.
    """
    texts: dict[str, list[str]] = {}
    for pair in pairs:
        name, path = _named(pair, "--lora", {}, "tuned=runs/quickstart/export")
        texts.setdefault(name, []).append(path)
    found = {name: adapter_sum(paths) for name, paths in texts.items()}
    return {name: lora for name, lora in found.items() if lora is not None}


def checkpoints(pairs: Sequence[str], loras: Mapping[str, object]) -> dict[str, Path]:
    """Parse `["NAME=PATH", ...]` of `--checkpoint` into a dictionary.

    Args:
      pairs: as the user gave them.
      loras: names that are in use already.

    Raises:
      UserError: a pair has no `=`, a name is repeated or reserved, or a path does not exist.
    """
    paths: dict[str, Path] = {}
    for pair in pairs:
        name, path = _named(pair, "--checkpoint", {**loras, **paths}, "full=runs/full/export")
        remedy = "pass a folder with a transformer, such as runs/full/export"
        paths[name] = existing(path, f"--checkpoint {name}", remedy)
    return paths


def _named(pair: str, option: str, taken: Mapping[str, object], example: str) -> tuple[str, str]:
    """Split NAME=PATH.

    Args:
      pair: as the user gave it.
      option: the option that it comes from, for messages.
      taken: names that are in use already.
      example: a right pair, for messages.

    Raises:
      UserError: there is no `=`, or the name is repeated or reserved.
    """
    name, equals, path = pair.partition("=")
    if not (name and equals and path):
        raise UserError(f"{option} {pair}: not NAME=PATH, such as {example}")
    if name in taken or name == "base" or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(
            f"{option} {pair}: the name {name!r} is taken or not made of letters, digits, - and _; "
            "choose another"
        )
    return name, path


def start_runtime() -> None:
    """Initialise the distributed runtime (see `parallel.hosts`) before the first JAX call."""
    from jax_idgrpo.parallel.hosts import initialise, trim_heap_after_compile

    initialise()
    trim_heap_after_compile()
