"""Define the names of LoRA adapters of the Wan transformer in PEFT and in diffusers.

y = W x + b + (alpha / R) B (A x). torch stores A [R, in] and B [out, R]; our leaves `lora_a` and
`lora_b` are both transposed. A PEFT directory holds `adapter_config.json` and
`adapter_model.safetensors`, with names that start with `base_model.model.`. Names in LoRA files of
diffusers start with `transformer.`. Sources: peft `LoraConfig`, diffusers `load_lora_weights`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from checkpoints_convert import wan
from checkpoints_convert.lazy import Shaped
from checkpoints_convert.rules import TRANSPOSE, Rule
from jax_idgrpo.models.wan import WanConfig

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
HEADER = "lora_adapter_metadata"  # diffusers' header field for rank and alpha
ALPHAS = ("lora_alpha", "alpha", "ss_network_alpha")  # other programs' header fields for alpha
Value = TypeVar("Value")

STACKS = ("blocks", "vace_blocks")
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


def rules(stacks: Iterable[str], prefix: str = PEFT_PREFIX) -> list[Rule]:
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


def header(rank: int, alpha: float) -> dict[str, str]:
    """Make the header of a diffusers LoRA file; without it, diffusers sets alpha to the rank."""
    fields = {
        name: value
        for name, value in config_to_json(rank, alpha).items()
        if name in ("r", "lora_alpha", "target_modules")
    }
    return {
        HEADER: json.dumps(
            {DIFFUSERS_PREFIX + name: value for name, value in fields.items()}, sort_keys=True
        )
    }


def config_to_json(rank: int, alpha: float) -> dict[str, object]:
    """Make the `adapter_config.json` that peft loads onto diffusers' transformer."""
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": None,
    }
