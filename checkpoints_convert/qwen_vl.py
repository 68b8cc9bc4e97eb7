"""Define the names of Qwen2.5-VL with a reward head, in both spellings of transformers.

transformers 4 writes `visual.*` and `model.layers.*`, transformers 5 `model.visual.*` and
`model.language_model.layers.*`. The published reward uses the former. Source: transformers
`models/qwen2_5_vl`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from checkpoints_convert.lazy import Tensor
from checkpoints_convert.rules import MATRIX, TRANSPOSE, VECTOR, Op, Rule, linear
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import QwenConfig, VisionConfig

Spelling = Literal["transformers4", "transformers5"]

PEFT_PREFIX = "base_model.model."
PREFIXES = {
    "transformers4": ("visual.", "model."),
    "transformers5": ("model.visual.", "model.language_model."),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")
ADAPTED = (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in SWIGLU))
HEAD, EMBEDDING, TIED = "rm_head.weight", "embed_tokens.weight", "lm_head.weight"


def spelling(names: Iterable[str]) -> Spelling:
    """Return the version of transformers that wrote the names."""
    return (
        "transformers5"
        if any("language_model." in name or "model.visual." in name for name in names)
        else "transformers4"
    )


def canonical(name: str) -> str:
    """Return a name as transformers 4 writes it, without the additions of peft.

    peft adds `base_model.model.` before every name, `base_layer.` to the names of adapted layers,
    and, where a whole state dict is stored, the adapter's name ("default") to the adapter's names.
    """
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    name = re.sub(r"\.lora_([AB])\.default\.", r".lora_\1.", name)
    for ours, theirs in zip(PREFIXES["transformers4"], PREFIXES["transformers5"], strict=True):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _patch_embedding(config: VisionConfig) -> Op:
    """Return the reordering of a Conv3d [D, C, t, h, w] with kernel = stride to [C*t*h*w, D]."""
    return Op((1, 2, 3, 4, 0), (4, 1), (None, None, config.frames, config.patch, config.patch))


def vision_rules(config: VisionConfig, prefix: str) -> list[Rule]:
    """List the rules of the vision tower with its merger; `prefix` starts its names."""
    block, ours = f"{prefix}blocks.{{i}}", "visual.blocks.{i}"
    return [
        Rule(
            f"{prefix}patch_embed.proj.weight",
            "visual.patch_embed.kernel",
            _patch_embedding(config),
        ),
        *(
            Rule(f"{block}.{name}.weight", f"{ours}.{name}.scale", VECTOR)
            for name in ("norm1", "norm2")
        ),
        *(
            rule
            for name in ("attn.qkv", "attn.proj")
            for rule in linear(f"{block}.{name}", f"{ours}.{name}")
        ),
        *(rule for name in SWIGLU for rule in linear(f"{block}.mlp.{name}", f"{ours}.mlp.{name}")),
        Rule(f"{prefix}merger.ln_q.weight", "visual.merger.ln_q.scale", VECTOR),
        *linear(f"{prefix}merger.mlp.0", "visual.merger.linear_1"),
        *linear(f"{prefix}merger.mlp.2", "visual.merger.linear_2"),
    ]


def rules(config: QwenConfig, layout: Spelling = "transformers4", head: bool = True) -> list[Rule]:
    """List the rules of all tensors of the network, without its adapter.

    Args:
      config: configuration of the network.
      layout: spelling of the names.
      head: whether there is a reward head, which a plain Qwen2.5-VL does not have.
    """
    vision, language = PREFIXES[layout]
    block, ours = f"{language}layers.{{i}}", "layers.{i}"
    norms = ("input_layernorm", "post_attention_layernorm")
    return [
        *vision_rules(config.vision, vision),
        Rule(f"{language}{EMBEDDING}", "embed_tokens", MATRIX, aliases=(TIED,)),
        *(Rule(f"{block}.{name}.weight", f"{ours}.{name}.scale", VECTOR) for name in norms),
        *(
            rule
            for name in ATTENTION
            for rule in linear(
                f"{block}.self_attn.{name}", f"{ours}.self_attn.{name}", bias=name != "o_proj"
            )
        ),
        *(
            rule
            for name in SWIGLU
            for rule in linear(f"{block}.mlp.{name}", f"{ours}.mlp.{name}", bias=False)
        ),
        Rule(f"{language}norm.weight", "norm.scale", VECTOR),
        *([Rule(HEAD, "rm_head.kernel", TRANSPOSE)] if head else []),
    ]


def lora_rules(prefix: str = f"{PEFT_PREFIX}model.") -> list[Rule]:
    """List the rules of the adapters of the language model; `prefix` precedes `layers.`."""
    return [
        Rule(
            f"{prefix}layers.{{i}}.{name}.lora_{part}.weight",
            f"layers.{{i}}.{name}.lora_{part.lower()}",
            TRANSPOSE,
        )
        for name in ADAPTED
        for part in ("A", "B")
    ]


def pop_language_head(
    tensors: dict[str, Tensor], sizes: Mapping[str, Any], source: Path
) -> tuple[Tensor, bool]:
    """Take the output layer [vocabulary, D] of the language model out of the tensors.

    The 3B model's output layer is its token embedding, the 7B model's is a matrix of its own:
    `tie_word_embeddings` decides.

    Args:
      tensors: named as transformers 4 names them; the entry of an own output layer is removed.
      sizes: contents of `config.json`.
      source: the model's folder, for the message.

    Returns:
      The output layer, and whether it is the token embedding.

    Raises:
      UserError: the tensor is missing.
    """
    head = tensors.pop(TIED, None)
    text = sizes.get("text_config") or {}
    tied = sizes.get("tie_word_embeddings", text.get("tie_word_embeddings", head is None))
    embedding = f"{PREFIXES['transformers4'][1]}{EMBEDDING}"
    found = tensors.get(embedding) if tied else head
    if found is None:
        raise UserError(
            f"{source}: has no tensor {embedding if tied else TIED}, which answers the questions; "
            "use the folder of a published Qwen2.5-VL"
        )
    return found, bool(tied)


def config_from_json(values: dict[str, Any]) -> QwenConfig:
    """Read a `config.json` of transformers 4 (flat) or 5 (`text_config`).

    Raises:
      ValueError: the file describes another model.
      KeyError: a field is missing.
    """
    if values.get("model_type") != "qwen2_5_vl":
        raise ValueError(
            f"model_type is {values.get('model_type')!r}, only 'qwen2_5_vl' is supported"
        )
    text, vision = values.get("text_config", values), values["vision_config"]
    rotary = text.get("rope_parameters") or text["rope_scaling"]
    return QwenConfig(
        vision=VisionConfig(
            depth=vision["depth"],
            width=vision["hidden_size"],
            heads=vision["num_heads"],
            ffn=vision["intermediate_size"],
            full_blocks=tuple(vision["fullatt_block_indexes"]),
            window=vision["window_size"],
            patch=vision.get("patch_size", 14),
            frames=vision.get("temporal_patch_size", 2),
            merge=vision.get("spatial_merge_size", 2),
        ),
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        ffn=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        sections=tuple(rotary["mrope_section"]),
        theta=float(rotary.get("rope_theta", text.get("rope_theta", 1e6))),
        eps=text["rms_norm_eps"],
    )


def config_to_json(config: QwenConfig) -> dict[str, Any]:
    """Make the `config.json` in the flat form of transformers 4, which version 5 also reads."""
    vision = config.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": config.width,
        "image_token_id": 151655,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": {
            "mrope_section": list(config.sections),
            "type": "mrope",
            "rope_type": "default",
        },
        "rope_theta": config.theta,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": {
            "depth": vision.depth,
            "fullatt_block_indexes": list(vision.full_blocks),
            "hidden_act": "silu",
            "hidden_size": vision.width,
            "in_chans": 3,
            "intermediate_size": vision.ffn,
            "model_type": "qwen2_5_vl",
            "num_heads": vision.heads,
            "out_hidden_size": config.width,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "spatial_patch_size": vision.patch,
            "temporal_patch_size": vision.frames,
            "tokens_per_second": 2,
            "window_size": vision.window,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vocab_size": config.vocabulary,
    }
