"""LoRA adapters of the Wan transformer: PEFT names against our `lora_a`, `lora_b` leaves.

y = W x + b + (alpha / R) B (A x); torch stores A [R, in] and B [out, R], we store both transposed. A PEFT directory holds
`adapter_config.json` and `adapter_model.safetensors`, whose names start with `base_model.model.`; diffusers LoRA files start
with `transformer.`. Sources: peft `LoraConfig`, diffusers `load_lora_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from checkpoints_convert import wan
from checkpoints_convert.rules import TRANSPOSE, Rule

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
HEADER = "lora_adapter_metadata"  # where diffusers keeps rank and alpha inside a safetensors file

UNSUPPORTED = {  # fields of adapter_config.json that change the mathematics, with the value that does not
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
    """The adapter of every attention projection: q, k, v, out of both attentions, in the given stacks of blocks.

    stacks: `wan.block_stacks(config)`, or `stacks_of` what a file holds. prefix: what the torch names start with.
    """
    return [
        Rule(
            f"{prefix}{stack}.{{i}}.{torch}.lora_{part}.weight", f"{stack}.{{i}}.{ours}.lora_{part.lower()}", TRANSPOSE
        )
        for stack in stacks
        for ours, torch, _ in wan.ATTENTION
        for part in ("A", "B")
    ]


def prefix(names: Iterable[str]) -> str:
    """What the names of an adapter file start with: PEFT's prefix, diffusers', or nothing."""
    first = next(iter(names), "")
    return next((start for start in PREFIXES if first.startswith(start)), "")


def stacks_of(names: Iterable[str], prefix: str) -> tuple[str, ...]:
    """The stacks of blocks that an adapter file names."""
    found = {name.removeprefix(prefix).split(".")[0] for name in names}
    return tuple(stack for stack in ("blocks", "vace_blocks") if stack in found)


def scale_from_json(values: Mapping[str, Any]) -> tuple[int, float]:
    """`adapter_config.json` -> (rank, alpha). ValueError for a variant of LoRA that this project does not compute."""
    for name, accepted in UNSUPPORTED.items():
        if values.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name} is {values[name]!r}, only plain LoRA is supported")
    return int(values["r"]), float(values["lora_alpha"])


def scale_from_header(values: Mapping[str, Any]) -> tuple[int, float]:
    """The header entry of a diffusers LoRA file, whose fields start with `transformer.`, -> (rank, alpha)."""
    fields = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in values.items()}
    return scale_from_json(fields)


def header(rank: int, alpha: float) -> dict[str, str]:
    """The header of a diffusers LoRA file, without which diffusers takes alpha for the rank."""
    fields = {name: value for name, value in config_to_json(rank, alpha).items() if name in ("r", "lora_alpha", "target_modules")}
    return {HEADER: json.dumps({DIFFUSERS_PREFIX + name: value for name, value in fields.items()}, sort_keys=True)}


def config_to_json(rank: int, alpha: float) -> dict[str, Any]:
    """The `adapter_config.json` that peft loads onto diffusers' transformer."""
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
