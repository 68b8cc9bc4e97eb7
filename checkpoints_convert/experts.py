"""Find the two transformers of a Wan 2.2 checkpoint, its experts, and their adapters.

    diffusers   transformer/ and transformer_2/, with `boundary_ratio` in `model_index.json`
    original    high_noise_model/ and low_noise_model/; the boundary is in the code of the
                repository, not in the folder

A step runs the high-noise expert if its timestep is at least boundary x 1000, else the other.
Sources: diffusers `pipeline_wan_vace.py`; Wan2.2 `wan/configs/wan_t2v_A14B.py`; VideoX-Fun
`config/wan2.2/wan_civitai_t2v.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert import store
from checkpoints_convert.identify import TRANSFORMER
from checkpoints_convert.places import ADAPTER_CONFIG, LoRASum, adapter_place
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.experts import NAMES

SECOND = "transformer_2"
FOLDERS = {TRANSFORMER: "high_noise_model", SECOND: "low_noise_model"}  # of the original layout
BOUNDARY = 0.875  # of A14B in the original layout
SHIFT = 12.0  # flow shift of A14B for sources without a scheduler


def family(part: str) -> str:
    """Return the family of networks of a part: that of both experts is the transformer's."""
    return TRANSFORMER if part == SECOND else part


def index_boundary(file: Path, values: Mapping[str, Any]) -> float | None:
    """Read the boundary of a `model_index.json`; None for one transformer.

    Args:
      file: the index.
      values: its content.

    Raises:
      UserError: the pipeline has other than one or two transformers, or states no usable boundary.
    """

    def named(part: str) -> bool:
        return any(name is not None for name in values.get(part) or [])

    more = sorted(name for name in values if name.startswith("transformer_") and named(name))
    if more not in ([], [SECOND]):
        raise UserError(
            f"{file}: names {', '.join(more)} beside transformer; one or two transformers are "
            "supported"
        )
    if values.get("expand_timesteps"):
        raise UserError(
            f"{file.parent}: has expand_timesteps (Wan 2.2 TI2V), which is not supported; give a "
            "VACE, Phantom or text-to-video model"
        )
    boundary = values.get("boundary_ratio")
    if (boundary is None) == (not more) and (file.parent / SECOND).is_dir() == bool(more):
        if boundary is None:
            return None
        if not isinstance(boundary, int | float) or not 0 < boundary < 1:
            raise UserError(f"{file}: boundary_ratio is {boundary!r}; it must be between 0 and 1")
        return float(boundary)
    signs = {
        f"{SECOND} in {file.name}": bool(more),
        f"boundary_ratio in {file.name}": boundary is not None,
        f"the folder {SECOND}/": (file.parent / SECOND).is_dir(),
    }
    missing = ", ".join(sign for sign, found in signs.items() if not found)
    raise UserError(
        f"{file.parent}: is half of a pipeline with two transformers: {missing} is missing; get "
        "the whole pipeline"
    )


def description(boundary: float) -> str:
    """Describe which expert runs at which timestep."""
    return f"experts: transformer from timestep {1000 * boundary:g} on, {SECOND} below it"


def require_one(path: Path, boundary: float | None) -> None:
    """Refuse to merge an adapter into a model with two transformers.

    Args:
      path: the model.
      boundary: as in `Checkpoint`.

    Raises:
      UserError: the model has two transformers.
    """
    if boundary is not None:
        raise UserError(
            f"{path}: has two transformers, and an adapter belongs to one; give MODEL/{TRANSFORMER} "
            f"or MODEL/{SECOND}"
        )


def original_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the experts in an original folder by part; none for one transformer.

    Raises:
      UserError: one of the two is missing.
    """
    folders = {part: path / name for part, name in FOLDERS.items()}
    missing = [folder.name for folder in folders.values() if not folder.is_dir()]
    if len(missing) == len(folders):
        return {}
    if missing:
        raise UserError(
            f"{path}: is half of a model with two transformers: {missing[0]}/ is missing; get the "
            "whole folder"
        )
    return folders


# ---- adapters ----------------------------------------------------------------------------------


def expert_adapters(path: Path) -> tuple[Path, ...]:
    """Find the adapters of two experts in a folder or in a run's workdir: (high, low noise).

    Their names hold `high_noise` and `low_noise`. Empty if `path` is anything else.

    Raises:
      UserError: there is one of the two, or more than one for an expert.
    """
    path = adapter_place(path)
    if not path.is_dir() or (path / ADAPTER_CONFIG).is_file():
        return ()
    entries = [
        entry
        for entry in store.visible(path.iterdir())
        if (entry.is_dir() and entry.name not in FOLDERS.values()) or entry.suffix in store.SUFFIXES
    ]
    found = [
        [entry for entry in entries if name in entry.name.lower().replace("-", "_")]
        for name in NAMES
    ]
    if not any(found):
        return ()
    for name, places in zip(NAMES, found, strict=True):
        if len(places) != 1:
            listed = ", ".join(place.name for place in places) or "none"
            raise UserError(
                f"{path}: should hold one adapter whose name holds {name}, and there is {listed}; "
                "keep one per expert"
            )
    return tuple(places[0] for places in found)


def exports_of_experts(source: Path, destination: Path, form: str) -> list[dict[str, Path]]:
    """List the exports of a pair of adapters, each as source and destination; none for others.

    Args:
      source: as in `expert_adapters`.
      destination: folder of both exports.
      form: format of the export.

    Raises:
      UserError: the pair should be merged, which needs a base for each.
    """
    pair = expert_adapters(source)
    if pair and form == "merged":
        raise UserError(
            f"--format merged: {source} holds the adapters of two transformers; export each onto "
            "its own, with --base MODEL/transformer and --base MODEL/transformer_2"
        )
    return [
        {"source": place, "destination": destination / name}
        for name, place in zip(NAMES, pair, strict=bool(pair))
    ]


def expert_places(path: str | Path | LoRASum, count: int) -> Sequence[Path | LoRASum]:
    """List the adapters at a path in the order of the experts; the path itself for one transformer.

    Args:
      path: an adapter, a folder with those of two experts, the workdir of a run, or a sum of these.
      count: transformers of the model, 1 or 2.

    Raises:
      UserError: there is one adapter for two experts, or the other way round.
    """
    if not isinstance(path, LoRASum):
        return _places(Path(path), count)
    parts = [(_places(part, count), scale) for part, scale in path.parts]
    return [
        LoRASum(tuple((places[expert], scale) for places, scale in parts))
        for expert in range(count)
    ]


def _places(path: Path, count: int) -> Sequence[Path]:
    pair = expert_adapters(path)
    if count == 1 and pair:
        raise UserError(
            f"{path}: holds adapters of two experts, and this model has one transformer; give one "
            "adapter of this model"
        )
    if count == 1:
        return [path]
    if not pair:
        high, low = NAMES
        raise UserError(
            f"{path}: is one adapter, and this model has two transformers; give a folder with two "
            f"adapters whose names hold {high} and {low}"
        )
    return pair
