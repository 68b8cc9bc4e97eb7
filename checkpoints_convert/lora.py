"""Define the names of LoRA adapters of the Wan transformer in PEFT and in diffusers.

y = W x + b + (alpha / R) B (A x). torch stores A [R, in] and B [out, R]; our leaves `lora_a` and
`lora_b` are both transposed. A PEFT directory holds `adapter_config.json` and
`adapter_model.safetensors`, with names that start with `base_model.model.`. Names in LoRA files of
diffusers start with `transformer.`. Sources: peft `LoraConfig`, diffusers `load_lora_weights`.
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

from checkpoints_convert import lora_names, wan
from checkpoints_convert.lazy import Shaped
from checkpoints_convert.lora_names import DIFFUSERS, OURS, Layer
from checkpoints_convert.rules import TRANSPOSE, Rule
from jax_idgrpo.models.lora import LayerLoRA
from jax_idgrpo.models.wan import PROJECTIONS, STACKS, WanConfig

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
HEADER = "lora_adapter_metadata"  # diffusers' header field for rank and alpha
ALPHAS = ("lora_alpha", "alpha", "ss_network_alpha")  # other programs' header fields for alpha
Value = TypeVar("Value")

MATRIX_NAME = r"(?P<stack>(vace_)?blocks)\.(?P<index>\d+)\.(?P<module>.+)\.lora_[AB]\.weight$"
CONVERT = "give it with PEFT's or diffusers' names, as diffusers writes it after loading it"
LYCORIS = r"(^|\.)(lokr|hada|oft|boft|glora)_|^lycoris_"

# A pattern in any name of an adapter file, what the file is, and the remedy; first match counts.
FOREIGN = (
    (LYCORIS, "is a LyCORIS adapter such as LoKr or LoHa, not a LoRA", "train a plain LoRA"),
    (
        r"\.(lora_magnitude_vector|dora_scale)\b",
        "is a DoRA adapter, not a plain LoRA",
        "merge it into its base first",
    ),
    (
        r"\.diff(_b|_m)?$",
        "holds diff and diff_b tensors, which are not LoRA (a distilled model)",
        "merge it into its base first",
    ),
    (
        r"^lora_(unet|te\d*|transformer)_",
        "is a LoRA with the names of musubi-tuner and kohya",
        CONVERT,
    ),
    (
        r"^diffusion_model\..*\.lora_(down|up)\.",
        "is a LoRA with ComfyUI's names (lora_down, lora_up)",
        CONVERT,
    ),
    (r"^diffusion_model\.", "is a LoRA with ComfyUI's names (diffusion_model.)", CONVERT),
    (
        r"\.lora_(down|up)\.",
        "is a LoRA with the names lora_down and lora_up, as kohya and ComfyUI write",
        CONVERT,
    ),
    (
        r"\.lora_[AB]\.(?!weight$|bias$)[^.]+\.weight$",
        "has an adapter's name inside its keys, as DiffSynth-Studio writes (lora_A.default.weight)",
        CONVERT,
    ),
    (
        r"\b(self_attn|cross_attn)\.[qkvo]\.",
        "is a LoRA with the names of the original repository",
        CONVERT,
    ),
    (
        r"\.lora_B\.bias$",
        "has biases beside its matrices (lora_bias), and only plain LoRA is read",
        "merge it first",
    ),
    (
        r"\.alpha$",
        "has an alpha tensor for every module",
        "write it again with one alpha in its header",
    ),
    (
        r"^text_encoder(_\d)?\.",
        "also adapts a text encoder",
        "write only the transformer's adapter",
    ),
)

UNSUPPORTED: dict[
    str, tuple[object, ...]
] = {  # fields of adapter_config.json for variants of LoRA, with the accepted values
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
}


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
    kept = {}
    for layer, (rank, _) in scales.items():
        a, b = (f"{prefix}{layer.spelled(DIFFUSERS)}.lora_{part}.weight" for part in ("A", "B"))
        kept |= {a: tensors[a][:rank], b: tensors[b][:, :rank]}
    return kept


def stack_rules(stacks: Iterable[str], prefix: str = PEFT_PREFIX) -> list[Rule]:
    """List the rules of the adapters of q, k, v and out of both attentions.

    Args:
      stacks: stacks of blocks, from `wan.block_stacks` or `stacks_of`.
      prefix: prefix of torch's names.
    """
    return [
        Rule(
            f"{prefix}{stack}.{{i}}.{torch}.lora_{part}.weight",
            f"{stack}.{{i}}.{ours}.lora_{part.lower()}",
            TRANSPOSE,
        )
        for stack in stacks
        for ours, torch, _ in wan.ATTENTION
        for part in ("A", "B")
    ]


def scales_in(tensors: Mapping[str, Shaped], prefix: str, alpha: float) -> dict[Layer, Scale]:
    """Return the adapted layers of a readable adapter file.

    Args:
      tensors: name -> anything with `shape`.
      prefix: prefix of the names.
      alpha: of all layers.
    """
    found = {}
    for name, tensor in tensors.items():
        layer = lora_names.find(name.removeprefix(prefix).removesuffix(".lora_A.weight"))
        if layer is not None:
            found[layer] = Scale(tensor.shape[0], alpha)
    return found


def prefix(names: Iterable[str]) -> str:
    """Return the prefix of the names of an adapter file: PEFT's, diffusers', or ""."""
    first = next((name for name in names if ".lora_" in name), "")
    return next((start for start in PREFIXES if first.startswith(start)), "")


def stacks_of(names: Iterable[str], prefix: str) -> tuple[str, ...]:
    """Return the stacks of blocks that an adapter file names."""
    named = {name.removeprefix(prefix).split(".")[0] for name in names}
    return tuple(stack for stack in STACKS if stack in named)


def complaint(tensors: Mapping[str, Shaped]) -> str | None:
    """Explain why an adapter file cannot be read, with the remedy.

    Args:
      tensors: name -> anything with `shape`; scalars are ignored.

    Returns:
      The explanation; None for a LoRA of every attention projection.
    """
    for pattern, what, remedy in FOREIGN:
        if any(re.search(pattern, name) for name in tensors):
            return f"{what}; {remedy}"
    names = [name for name, tensor in tensors.items() if tensor.shape]
    matrices = {name: match for name in names if (match := re.search(MATRIX_NAME, name))}
    ranks = sorted({tensors[name].shape[0] for name in matrices if name.endswith(".lora_A.weight")})
    if not ranks:
        return "has no tensor named *.lora_A.weight; give a LoRA"
    starts = sorted({name[: match.start()] for name, match in matrices.items()})
    if (
        start := next((start for start in starts if start not in (*PREFIXES, "")), None)
    ) is not None:
        return f"has names that start with {start!r}; {CONVERT}"
    if len(starts) > 1:
        return f"has names that start with {starts[0]!r} and with {starts[1]!r}; give one adapter"
    if others := sorted(set(names) - set(matrices)):
        return f"holds {_listed(others)} beside the LoRA; save only the LoRA"
    modules = {match["module"] for match in matrices.values()}
    known = {torch for _, torch, _ in wan.ATTENTION}
    if more := sorted(modules - known):
        what = f"also adapts {_listed(more)}, and only adapters of attention projections are read"
        return f"{what}; merge it into its base"
    if missing := sorted(known - modules):
        return (
            f"does not adapt {_listed(missing)}, and only adapters of all attention projections "
            "are read"
        )
    if len(ranks) > 1:
        return f"has modules of ranks {_listed(ranks)}, and only adapters of one rank are read"
    return None


def sizes(tensors: Mapping[str, Shaped]) -> tuple[set[int], dict[str, int]]:
    """Return (widths, blocks of each stack) of the network that an adapter is made for."""
    heights = dict.fromkeys(STACKS, 0)
    widths = set()
    for name, tensor in tensors.items():
        if match := re.search(MATRIX_NAME, name):
            heights[match["stack"]] = max(heights[match["stack"]], 1 + int(match["index"]))
            widths.add(int(tensor.shape[1 if name.endswith("A.weight") else 0]))
    return widths, heights


def misfit(tensors: Mapping[str, Shaped], config: WanConfig) -> str | None:
    """Explain why a readable adapter does not fit this transformer; None if the sizes agree."""
    widths, heights = sizes(tensors)
    vace = len(config.vace_layers)
    if widths != {config.width}:
        return f"made for width {_listed(sorted(widths))}, this model has {config.width}"
    if heights["vace_blocks"] and not vace:
        return "made for a VACE model, this one has no VACE blocks (plain Wan or Phantom)"
    if vace and not heights["vace_blocks"]:
        return "made for a model without VACE blocks (plain Wan or Phantom), this one is VACE"
    for stack, height in (("blocks", config.num_layers), ("vace_blocks", vace)):
        if heights[stack] != height:
            return f"made for {heights[stack]} {stack}, this model has {height}"
    return None


def _listed(items: Iterable[object]) -> str:
    """Join at most four of the items with commas."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def number(value: Any) -> float:
    """Convert alpha to a number; ValueError if it is no finite number."""
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {value!r}, which is no finite number; correct it")
    return alpha


def scale_from_json(values: Mapping[str, Any]) -> tuple[int, float]:
    """Read (rank, alpha) of an `adapter_config.json`; ValueError for an unsupported variant."""
    refuse_variants(values)
    return int(values["r"]), number(values["lora_alpha"])


def refuse_variants(values: Mapping[str, Any]) -> None:
    """Raise a ValueError for the config of an unsupported variant of LoRA."""
    for name, accepted in UNSUPPORTED.items():
        if values.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name} is {values[name]!r}, only plain LoRA is supported")


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
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    return values | {name: pattern for name, pattern in patterns.items() if pattern}


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
