"""Open LoRA adapters: which file holds one, its ranks and alphas, and its tensors as a network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_convert import lora, lora_checks, lora_dialects, lora_names, store
from checkpoints_convert.identify import ADAPTER
from checkpoints_convert.lazy import LazyTensor
from checkpoints_convert.lora import Scale
from checkpoints_convert.lora_dialects import Parsed
from checkpoints_convert.lora_names import Layer
from checkpoints_convert.network import Network, naming
from checkpoints_convert.places import ADAPTER_CONFIG, adapter_place
from checkpoints_convert.rules import TRANSPOSE, Rule
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.wan import WanConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"  # of older versions of PEFT


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """A file of a LoRA in any dialect, perhaps with tensors that can only be merged.

    Attributes:
      weights: the file.
      tensors: its tensors by name.
      parsed: its names.
      scales: rank and alpha of every module that has A and B.
      unstated: whether no alpha is stated, so that it is the rank, as the dialect defines.
    """

    weights: Path
    tensors: Mapping[str, LazyTensor]
    parsed: Parsed
    scales: Mapping[str, Scale]
    unstated: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """A place that states alphas.

    Attributes:
      read: maps a module and its rank to its alpha; None if none is stated.
      by_module: whether modules may have alphas of their own.
    """

    read: Callable[[str, int], float | None]
    by_module: bool


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """Find the weights and the PEFT config of an adapter folder or file, or of a run's workdir.

    The config beside a file belongs to the file if the file has PEFT's name or names, or is the
    only adapter there.

    Returns:
      (weights, config or None).
    """
    path = adapter_place(path)
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        named = [
            path / name for name in (ADAPTER_WEIGHTS, PICKLED_WEIGHTS) if (path / name).is_file()
        ]
        if not named and not store.weights_files(path):
            what = f"has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}"
            raise UserError(f"{path}: {what}; get the whole adapter folder")
        weights = named[0] if named else store.weights_file(path)
    else:
        weights = store.weights_file(path)
    config = weights.with_name(ADAPTER_CONFIG)
    if not config.is_file():
        return weights, None
    others = [weights.with_name(name) for name in (ADAPTER_WEIGHTS, PICKLED_WEIGHTS)]
    owned = weights in others or not any(file.is_file() for file in others)
    dialect = lora_dialects.dialect_of(store.open_weights(weights)[0])
    return weights, config if owned or dialect == lora_dialects.PEFT else None


def open_lora_file(path: str | Path, alpha: float | None = None, merge: bool = False) -> LoRAFile:
    """Open a LoRA of any dialect and find rank and alpha of its modules.

    A module's alpha is that of its own tensor, of the PEFT config, or of the file's header. Without
    any, alpha is the rank if the dialect defines it so (see `Dialect.unstated`).

    Args:
      path: a folder, a file, or the workdir of a run.
      alpha: alpha stated by the user, for a file that does not state it.
      merge: whether variants of LoRA that can only be merged are accepted.

    Raises:
      UserError: there is no readable LoRA, two places state different alphas, or alpha is unknown.
    """
    weights, config = adapter_files(Path(path))
    tensors, metadata = store.open_weights(weights)
    parsed = lora_dialects.parse(tensors)
    if (what := lora_checks.complaint(parsed, tensors)) is not None:
        raise UserError(f"{weights}: {what}")
    if not merge and (what := lora_checks.not_plain(parsed, tensors)) is not None:
        raise UserError(f"{weights}: {what}")
    places = _places(weights, config, metadata, merge)
    scales, unstated = {}, False
    for module, parts in parsed.modules.items():
        if "a" not in parts:
            continue
        rank = int(tensors[parts["a"]].shape[0])
        own = tensors[parts["alpha"]] if "alpha" in parts else None
        alphas = _alphas(weights, places, module, rank, own)
        if alpha is not None:
            alphas["--alpha"] = alpha
        if len(set(alphas.values())) > 1:
            each = ", ".join(f"{value:g} in {place}" for place, value in alphas.items())
            raise UserError(f"{weights}: its alpha is {each}; make them equal")
        if not alphas and (config is not None or not parsed.dialect.unstated):
            raise UserError(f"{weights}: {_unknown_alpha(weights, config)}")
        unstated |= not alphas
        place, value = next(iter(alphas.items()), ("", float(rank)))
        if value <= 0:
            raise UserError(
                f"{weights}: alpha of {parts['a']} is {value:g} in {place}, so that the layer has "
                "no effect or the opposite one; correct it"
            )
        scales[module] = Scale(rank, value)
    return LoRAFile(weights, tensors, parsed, scales, unstated)


def _unknown_alpha(weights: Path, config: Path | None) -> str:
    where = (
        f"{config.name} has no lora_alpha"
        if config is not None
        else f"no {ADAPTER_CONFIG} is beside it"
    )
    command = f"idgrpo-convert import {weights} ADAPTER --alpha A"
    remedy = f"get the whole adapter, or state it with {command}"
    return f"its alpha is not known, since {where}; {remedy}"


def _alphas(
    weights: Path, places: Mapping[str, Place], module: str, rank: int, own: LazyTensor | None
) -> dict[str, float]:
    """Return every alpha that is stated for a module, by the place that states it.

    Args:
      weights: file of the adapter.
      places: the places that may state it.
      module: name of the module.
      rank: its rank.
      own: its alpha tensor; the scalars in the header of such a file are those that training began
        with, and do not count.
    """
    found = {}
    for name, place in places.items():
        if own is None or place.by_module:
            value = place.read(module, rank)
            if value is not None:
                found[name] = value
    if own is not None:
        found[own.name] = _own_alpha(weights, own)
    return found


def _own_alpha(weights: Path, tensor: LazyTensor) -> float:
    """Read the alpha of one module from its tensor."""
    if np.prod(tensor.shape, dtype=int) != 1:
        raise UserError(
            f"{weights}: tensor {tensor.name} has shape {list(tensor.shape)}, not that of a number"
        )
    try:
        return lora.number(np.asarray(tensor).astype(np.float64).item())
    except ValueError as error:
        raise UserError(f"{weights}: tensor {tensor.name}: {error}") from None


def _places(
    weights: Path, config: Path | None, metadata: Mapping[str, str], merge: bool
) -> dict[str, Place]:
    """Find the places that state alphas: the PEFT config and the header of the file.

    Args:
      weights: file of the adapter.
      config: PEFT config of the adapter, if there is one.
      metadata: header of the file.
      merge: whether variants of LoRA that can only be merged are accepted.

    Raises:
      UserError: the adapter is a variant of LoRA, states another rank, or its alpha is no number.
    """
    places: dict[str, Place] = {}

    def state(file: Path, place: str, values: Mapping[str, Any]) -> None:
        lora.refuse_variants(values, lora.MERGEABLE if merge else ())

        def read(module: str, rank: int) -> float | None:
            with naming(file):
                stated_rank, alpha = lora.stated_scale(values, module)
            if stated_rank != rank:
                what = (
                    f"states rank {stated_rank} for {module}, the tensors of {weights.name} have "
                    f"{rank}"
                )
                raise UserError(f"{file}: {what}; get both files again")
            return alpha

        places[place] = Place(read, by_module=True)

    if config is not None:
        with naming(config):
            state(config, config.name, store.read_json(config))
    if lora.HEADER in metadata:
        with naming(weights):
            state(
                weights,
                f"{lora.HEADER} in its header",
                lora.fields_of_header(json.loads(metadata[lora.HEADER])),
            )

    def scalar(name: str) -> Place:
        def read(module: str, rank: int) -> float:
            with naming(weights):
                return lora.number(metadata[name])

        return Place(read, by_module=False)

    return places | {
        f"{name} in its header": scalar(name) for name in lora.ALPHAS if name in metadata
    }


def adapter_scale(path: Path, alpha: float | None = None) -> Scale:
    """Read rank and alpha of an adapter, the most frequent ones if its layers differ.

    Args:
      path: as in `open_lora_file`.
      alpha: as in `open_lora_file`.

    Raises:
      UserError: as in `open_adapter`.
    """
    return lora.common(open_adapter(path, alpha).config)


def states_alpha(path: Path) -> bool:
    """Return whether an adapter states an alpha for every module."""
    return not open_lora_file(path).unstated


def open_adapter(path: Path, alpha: float | None = None) -> Network:
    """Open a LoRA of linear layers in any dialect (see `open_lora_file`).

    The `config` of the network is the rank and alpha of every adapted layer.

    Raises:
      UserError: as in `open_lora_file`, or the file can only be merged.
    """
    file = open_lora_file(path, alpha)
    table, shapes, used = [], {}, dict.fromkeys(file.parsed.text)
    scales: dict[Layer, Scale] = {}
    for module, parts in file.parsed.modules.items():
        layer = lora_names.find(module)
        assert layer is not None
        if layer in scales:
            raise UserError(f"{file.weights}: adapts {layer.name} twice, also as {parts['a']}")
        scales[layer] = file.scales[module]
        for part in ("a", "b"):
            name = parts[part]
            tensor, leaf = file.tensors[name], f"{layer.name}.lora_{part}"
            table.append(Rule(name, leaf, TRANSPOSE))
            shapes[leaf] = jax.ShapeDtypeStruct(TRANSPOSE.shape(tensor.shape), tensor.dtype)
            used[name] = None
    return Network(
        part=ADAPTER,
        layout=file.parsed.dialect.name,
        config=scales,
        values=lora.config_to_json(scales),
        table=table,
        shapes=shapes,
        tensors={name: file.tensors[name] for name in used},
        source=file.weights,
        surplus=".*",
    )


def misfit(adapter: Network, config: WanConfig) -> str | None:
    """Explain why an adapter does not fit a transformer; None if it does."""
    named = {slot.name: (tensor.name, tensor) for slot, tensor in adapter.matched()}
    return lora_checks.misfit(
        {
            layer: (*named[f"{layer.name}.lora_a"], *named[f"{layer.name}.lora_b"])
            for layer in adapter.config
        },
        config,
    )
