"""Open LoRA adapters: which file holds one, its rank and alpha, and its tensors as a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert import lora, rules, store
from checkpoints_convert.identify import ADAPTER
from checkpoints_convert.network import Network, naming
from checkpoints_convert.places import ADAPTER_CONFIG, adapter_place
from jax_idgrpo.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"  # of older versions of PEFT


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
    return weights, config if owned or lora.prefix(
        store.open_weights(weights)[0]
    ) == lora.PEFT_PREFIX else None


def adapter_scale(path: Path, alpha: float | None = None) -> tuple[int, float]:
    """Read (rank, alpha) of an adapter from its PEFT config or the header of its file.

    A file without a prefix or with diffusers' prefix that states no alpha has alpha = rank, as
    diffusers defines it. PEFT's names come with a config, without which alpha is unknown.

    Args:
      path: a folder, a file, or the workdir of a run.
      alpha: alpha stated by the user, for a file that does not state it.

    Raises:
      UserError: there is no readable adapter, two places state different alphas, or alpha is
        unknown.
    """
    weights, config = adapter_files(path)
    tensors, metadata = store.open_weights(weights)
    if (what := lora.complaint(tensors)) is not None:
        raise UserError(f"{weights}: {what}")
    rank = next(
        tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")
    )
    stated = _stated(weights, config, metadata, rank)
    if alpha is not None:
        stated["--alpha"] = alpha
    if len(set(stated.values())) > 1:
        listed = ", ".join(f"{value:g} in {place}" for place, value in stated.items())
        raise UserError(f"{weights}: its alpha is {listed}; make them equal")
    if stated:
        return rank, next(iter(stated.values()))
    if config is not None or lora.prefix(tensors) == lora.PEFT_PREFIX:
        where = (
            f"{config.name} has no lora_alpha"
            if config is not None
            else f"no {ADAPTER_CONFIG} is beside it"
        )
        command = f"idgrpo-convert import {weights} ADAPTER --alpha A"
        remedy = f"get the whole adapter, or state it with {command}"
        raise UserError(f"{weights}: its alpha is not known, since {where}; {remedy}")
    return rank, float(rank)


def stated_alphas(path: Path) -> dict[str, float]:
    """Read every alpha that an adapter states, keyed by place: its config or its file's header."""
    weights, config = adapter_files(path)
    return _stated(weights, config, store.open_weights(weights)[1], adapter_scale(path)[0])


def _stated(
    weights: Path, config: Path | None, metadata: Mapping[str, str], rank: int
) -> dict[str, float]:
    """Read every alpha that an adapter states, keyed by place.

    Args:
      weights: file of the adapter.
      config: PEFT config of the adapter, if there is one.
      metadata: header of the file.
      rank: rank of the tensors.

    Raises:
      UserError: the adapter is a variant of LoRA, states another rank, or its alpha is no number.
    """
    alphas: dict[str, float] = {}

    def state(file: Path, place: str, values: Mapping[str, Any]) -> None:
        lora.refuse_variants(values)
        if (stated_rank := int(values["r"])) != rank:
            what = f"states rank {stated_rank}, the tensors of {weights.name} have {rank}"
            raise UserError(f"{file}: {what}; get both files again")
        if "lora_alpha" in values:
            alphas[place] = lora.number(values["lora_alpha"])

    if config is not None:
        with naming(config):
            state(config, config.name, store.read_json(config))
    with naming(weights):
        if lora.HEADER in metadata:
            state(
                weights,
                f"{lora.HEADER} in its header",
                lora.fields_of_header(json.loads(metadata[lora.HEADER])),
            )
        for name in lora.ALPHAS:
            if name in metadata:
                alphas[f"{name} in its header"] = lora.number(metadata[name])
    return alphas


def open_adapter(path: Path, alpha: float | None = None) -> Network:
    """Open a PEFT folder, or a file with PEFT's, diffusers' or no prefix (see `adapter_scale`)."""
    weights, config = adapter_files(path)
    rank, alpha = adapter_scale(path, alpha)
    tensors, _ = store.open_weights(weights)
    prefix = lora.prefix(tensors)
    table = lora.stack_rules(lora.stacks_of(tensors, prefix), prefix)
    return Network(
        part=ADAPTER,
        layout="peft" if config is not None else "diffusers-lora",
        config=(rank, alpha),
        values=lora.config_to_json(lora.scales_in(tensors, prefix, alpha)),
        table=table,
        shapes=rules.infer(table, tensors, str(weights)),
        tensors=tensors,
        source=weights,
    )
