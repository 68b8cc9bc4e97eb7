"""Describe LoRA adapters of the Wan transformer: adapted layers, ranks, alphas, and PEFT's config.

y = W x + b + (alpha / R) B (A x). torch stores A [R, in] and B [out, R]; our leaves `lora_a` and
`lora_b` are both transposed. A PEFT directory holds `adapter_config.json` and
`adapter_model.safetensors`. Sources: peft `LoraConfig`, diffusers `load_lora_weights`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np

from checkpoints_convert import lora_dialects, lora_names
from checkpoints_convert.lazy import Tensor
from checkpoints_convert.lora_names import DIFFUSERS, OURS, Layer
from checkpoints_convert.rules import TRANSPOSE, Rule
from jax_idgrpo.models.lora import LayerLoRA
from jax_idgrpo.models.wan import PROJECTIONS, STACKS, WanConfig

PEFT_PREFIX = lora_dialects.PEFT.prefix
DIFFUSERS_PREFIX = lora_dialects.DIFFUSERS_LORA.prefix
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
HEADER = "lora_adapter_metadata"  # diffusers' header field for rank and alpha
ALPHAS = ("lora_alpha", "alpha", "ss_network_alpha")  # other programs' header fields for alpha
Value = TypeVar("Value")

MERGE = "merge it into its base with idgrpo-convert import BASE STORE --merge FILE"

# Fields of adapter_config.json for variants of LoRA, with the accepted values and a remedy.
UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), ""),
    "bias": (("none",), ""),
    "use_dora": ((False, None), f"; {MERGE}"),
    "use_qalora": ((False, None), ""),
    "layer_replication": ((None,), ""),
    "modules_to_save": ((None, []), ""),
    "fan_in_fan_out": ((False, None), ""),
    "lora_bias": ((False, None), f"; {MERGE}"),
}
MERGEABLE = ("use_dora", "lora_bias")  # fields that do not matter to a merge


class Scale(NamedTuple):
    """Rank and alpha of one adapted layer, whose scale is alpha / rank."""

    rank: int
    alpha: float


Scales = Mapping[Layer, Scale]
"""Every adapted layer with its rank and alpha."""


class Fields(TypedDict):
    """The fields of `WanConfig` that describe its LoRA."""

    rank: int
    alpha: float
    lora: tuple[LayerLoRA, ...] | None


def common(scales: Scales) -> Scale:
    """Return the most frequent pair of rank and alpha."""
    return collections.Counter(scales.values()).most_common(1)[0][0]


def fields(scales: Scales, config: WanConfig) -> Fields:
    """Describe an adapter as fields of the config of its transformer; inverse of `scales_of`.

    Args:
      scales: the adapted layers; not empty.
      config: sizes of the transformer.
    """
    by_leaf: dict[str, list[Scale]] = {}
    for layer, scale in scales.items():
        blocks = by_leaf.setdefault(layer.leaf, [Scale(0, 0.0)] * (config.depth(layer.leaf) or 1))
        blocks[layer.block or 0] = scale
    rank, alpha = common(scales)
    layers = tuple(
        LayerLoRA(name, *map(tuple, zip(*blocks, strict=True)))
        for name, blocks in sorted(by_leaf.items())
    )
    standard = sorted(
        dataclasses.replace(config, rank=rank, alpha=alpha, lora=None).lora_layers,
        key=lambda layer: layer.name,
    )
    return Fields(rank=rank, alpha=alpha, lora=None if list(layers) == standard else layers)


def scales_of(config: WanConfig) -> dict[Layer, Scale]:
    """Return rank and alpha of every layer of a transformer that has LoRA."""
    described = {layer.name: layer for layer in config.lora_layers}
    found = {}
    for layer in lora_names.layers(config):
        if (adapted := described.get(layer.leaf)) is not None:
            scale = Scale(adapted.ranks[layer.block or 0], adapted.alphas[layer.block or 0])
            if scale.rank:
                found[layer] = scale
    return found


def rules(config: WanConfig, prefix: str = PEFT_PREFIX) -> list[Rule]:
    """List the rules between diffusers' names and the LoRA leaves of a transformer.

    Args:
      config: of the transformer, with its LoRA.
      prefix: prefix of torch's names.
    """
    rows = {row[OURS].replace("{i}.", ""): row for row in lora_names.ROWS}
    return [
        Rule(
            f"{prefix}{rows[layer.name][DIFFUSERS]}.lora_{part}.weight",
            f"{rows[layer.name][OURS]}.lora_{part.lower()}",
            TRANSPOSE,
        )
        for layer in config.lora_layers
        for part in ("A", "B")
    ]


def cut(
    tensors: Mapping[str, np.ndarray], scales: Scales, prefix: str = PEFT_PREFIX
) -> dict[str, np.ndarray]:
    """Take the adapted layers, each with its own rank, from tensors of the largest rank.

    Args:
      tensors: A and B of a transformer's leaves by diffusers' names.
      scales: the adapted layers.
      prefix: prefix of the names.
    """
    kept: dict[str, np.ndarray] = {}
    for layer, (rank, _) in scales.items():
        a, b = (f"{prefix}{layer.spelled(DIFFUSERS)}.lora_{part}.weight" for part in ("A", "B"))
        kept |= {a: tensors[a][:rank], b: tensors[b][:, :rank]}
    return kept


def number(value: Any) -> float:
    """Convert alpha to a number; ValueError if it is no finite number."""
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {value!r}, which is no finite number; correct it")
    return alpha


def padded(
    matrices: Mapping[str, Tensor], config: WanConfig, prefix: str = PEFT_PREFIX
) -> dict[str, np.ndarray]:
    """Return A and B of every block of a transformer's LoRA leaves; inverse of `cut`.

    They are in torch's layout, with diffusers' names, and zero beyond the rank of their block.

    Args:
      matrices: A and B in torch's layout, by our names, of the layers with LoRA.
      config: of the transformer, with its LoRA.
      prefix: prefix of the names.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks = {layer.name: layer.rank for layer in config.lora_layers}
    for layer in lora_names.layers(config):
        if layer.leaf not in ranks:
            continue
        inputs, outputs = lora_names.shape(layer, config)
        rank = ranks[layer.leaf]
        a, b = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
        if f"{layer.name}.lora_a" in matrices:
            own = matrices[f"{layer.name}.lora_a"].shape[0]
            a[:own] = np.asarray(matrices[f"{layer.name}.lora_a"])
            b[:, :own] = np.asarray(matrices[f"{layer.name}.lora_b"])
        name = f"{prefix}{layer.spelled(DIFFUSERS)}.lora_"
        tensors |= {f"{name}A.weight": a, f"{name}B.weight": b}
    return tensors


def refuse_variants(values: Mapping[str, Any], but: Iterable[str] = ()) -> None:
    """Raise a ValueError for the config of an unsupported variant of LoRA.

    Args:
      values: fields of the config.
      but: fields that are not looked at.
    """
    for name, (accepted, remedy) in UNSUPPORTED.items():
        if name not in but and values.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name} is {values[name]!r}, only plain LoRA is supported{remedy}")


def stated_scale(values: Mapping[str, Any], module: str) -> tuple[int, float | None]:
    """Read rank and alpha of a module from a PEFT config; alpha is None if it is not stated.

    With `use_rslora` the scale is alpha / sqrt(rank), so that alpha here is alpha sqrt(rank).

    Args:
      values: fields of the config.
      module: the module's name without a prefix.

    Raises:
      ValueError: a field is not of the form that PEFT writes.
    """
    rank = int(_pattern(values.get("rank_pattern"), module, values["r"]))
    alpha = _pattern(values.get("alpha_pattern"), module, values.get("lora_alpha"))
    if "lora_alpha" not in values and alpha is None:
        return rank, None
    return rank, number(alpha) * (math.sqrt(rank) if values.get("use_rslora") else 1.0)


def _pattern(patterns: Mapping[str, Value] | None, module: str, default: Value) -> Value:
    """Return the value of the first pattern that PEFT finds for a module."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression") from None
    return default


def fields_of_header(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the header entry of a diffusers LoRA file with the field names of a PEFT config."""
    return {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in values.items()}


def header(scales: Scales) -> dict[str, str]:
    """Make the header of a diffusers LoRA file; without it, diffusers sets alpha to the rank."""
    stated = {
        name: value
        for name, value in config_to_json(scales).items()
        if name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    }
    values = {DIFFUSERS_PREFIX + name: value for name, value in stated.items()}
    return {HEADER: json.dumps(values, sort_keys=True)}


def config_to_json(scales: Scales) -> dict[str, object]:
    """Make the `adapter_config.json` that peft loads onto diffusers' transformer.

    Layers whose rank or alpha differs from the most frequent one are named in PEFT's patterns.
    """
    rank, alpha = common(scales)
    ranks = {layer.spelled(DIFFUSERS): each.rank for layer, each in scales.items()}
    alphas = {layer.spelled(DIFFUSERS): _plain(each.alpha) for layer, each in scales.items()}
    values: dict[str, object] = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS) if _everywhere(scales) else sorted(ranks),
        "task_type": None,
    }
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": {_whole(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_whole(name): value for name, value in alphas.items() if value != alpha},
    }
    return values | {name: pattern for name, pattern in patterns.items() if pattern}


def _whole(name: str) -> str:
    """Return PEFT's pattern of one layer: a name without dots is also the end of others."""
    return name if "." in name else f"^{name}"


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _everywhere(scales: Scales) -> bool:
    """Return whether the projections of both attentions, and no others, are adapted everywhere."""
    blocks: dict[str, set[int | None]] = {}
    for layer in scales:
        blocks.setdefault(layer.leaf, set()).add(layer.block)
    stacks = [stack for stack in STACKS if any(leaf.startswith(f"{stack}.") for leaf in blocks)]
    counts = {stack: len(blocks.get(f"{stack}.{PROJECTIONS[0]}", ())) for stack in stacks}
    return blocks == {
        f"{stack}.{name}": set(range(counts[stack])) for stack in stacks for name in PROJECTIONS
    }
