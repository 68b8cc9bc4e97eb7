"""Define the names of the Wan 2.1 transformer, with or without VACE blocks, in both layouts.

One row per module: our name, diffusers', the original repository's. Phantom has plain Wan's names.
Sources: diffusers `transformer_wan.py`, `transformer_wan_vace.py`; Wan2.1 `wan/modules/model.py`,
`vace_model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from checkpoints_convert.lazy import Shaped
from checkpoints_convert.rules import TABLE, VECTOR, Rule, linear, patch
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.wan import VaceConfig, WanConfig

Layout = Literal["diffusers", "original"]

DIFFUSERS_VERSION = "0.35.0"  # our files have the form of this version
PATCH = (1, 2, 2)
HEAD_DIM = 128  # of every published size; shapes do not determine it
TEXT_LENGTH = 512
FIXED = {  # assumptions of the network; a config with other values describes another network
    "patch_size": list(PATCH),
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
}
NO_IMAGE_TO_VIDEO = (
    "this is an image-to-video model, which is not supported; give a VACE, Phantom or "
    "text-to-video one"
)

TOP_LINEAR = (
    (
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_1",
        "time_embedding.0",
    ),
    (
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_embedder.linear_2",
        "time_embedding.2",
    ),
    ("condition_embedder.time_proj", "condition_embedder.time_proj", "time_projection.1"),
    (
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_1",
        "text_embedding.0",
    ),
    (
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.text_embedder.linear_2",
        "text_embedding.2",
    ),
    ("proj_out", "proj_out", "head.head"),
)
ATTENTION = (
    ("attn1.to_q", "attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "attn1.to_v", "self_attn.v"),
    ("attn1.to_out", "attn1.to_out.0", "self_attn.o"),
    ("attn2.to_q", "attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "attn2.to_v", "cross_attn.v"),
    ("attn2.to_out", "attn2.to_out.0", "cross_attn.o"),
)
FEED_FORWARD = (
    ("ffn.linear_1", "ffn.net.0.proj", "ffn.0"),
    ("ffn.linear_2", "ffn.net.2", "ffn.2"),
)
QK_NORM = (
    ("attn1.norm_q", "attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "attn1.norm_k", "self_attn.norm_k"),
    ("attn2.norm_q", "attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "attn2.norm_k", "cross_attn.norm_k"),
)
CROSS_NORM = ("norm2", "norm2", "norm3")
BLOCK_TABLE = ("scale_shift_table", "scale_shift_table", "modulation")
HEAD_TABLE = ("scale_shift_table", "scale_shift_table", "head.modulation")
VACE_IN = ("vace_proj_in", "vace_blocks.0.proj_in", "vace_blocks.0.before_proj")
VACE_OUT = ("proj_out", "proj_out", "after_proj")


def block_stacks(config: WanConfig) -> tuple[str, ...]:
    """Return the stacks of transformer blocks, which have the same names in all layouts."""
    return ("blocks",) if config.vace is None else ("blocks", "vace_blocks")


def rules(config: WanConfig, layout: Layout = "diffusers") -> list[Rule]:
    """List the rules of all tensors of the transformer in a layout; adapters are in `lora`."""
    column = 1 if layout == "diffusers" else 2
    vace = config.vace is not None
    table = [Rule(HEAD_TABLE[column], HEAD_TABLE[0], TABLE)]
    for name in ("patch_embedding", "vace_patch_embedding") if vace else ("patch_embedding",):
        table += [
            Rule(f"{name}.weight", f"{name}.kernel", patch(PATCH)),
            Rule(f"{name}.bias", f"{name}.bias", VECTOR),
        ]
    for row in (*TOP_LINEAR, VACE_IN) if vace else TOP_LINEAR:
        table += linear(row[column], row[0])
    for stack in block_stacks(config):
        prefix = f"{stack}.{{i}}."
        table.append(Rule(prefix + BLOCK_TABLE[column], prefix + BLOCK_TABLE[0], TABLE))
        table.append(
            Rule(f"{prefix}{CROSS_NORM[column]}.weight", f"{prefix}{CROSS_NORM[0]}.scale", VECTOR)
        )
        table.append(
            Rule(f"{prefix}{CROSS_NORM[column]}.bias", f"{prefix}{CROSS_NORM[0]}.bias", VECTOR)
        )
        table += [
            Rule(f"{prefix}{row[column]}.weight", f"{prefix}{row[0]}.scale", VECTOR)
            for row in QK_NORM
        ]
        modules = (
            (*ATTENTION, *FEED_FORWARD, VACE_OUT)
            if stack == "vace_blocks"
            else (*ATTENTION, *FEED_FORWARD)
        )
        for row in modules:
            table += linear(prefix + row[column], prefix + row[0])
    return table


def config_from_json(values: dict[str, Any]) -> WanConfig:
    """Read a `transformer/config.json` of diffusers.

    Raises:
      ValueError: the architecture is not Wan 2.1's.
      KeyError: a field is missing.
    """
    for name in ("image_dim", "added_kv_proj_dim"):
        if values.get(name) is not None:
            raise ValueError(f"{name} is {values[name]!r}: {NO_IMAGE_TO_VIDEO}")
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}, only {value!r} is supported")
    layers = values.get("vace_layers")
    return WanConfig(
        num_layers=values["num_layers"],
        num_heads=values["num_attention_heads"],
        head_dim=values["attention_head_dim"],
        ffn_dim=values["ffn_dim"],
        text_dim=values["text_dim"],
        freq_dim=values["freq_dim"],
        eps=values["eps"],
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        rope_max_seq_len=values["rope_max_seq_len"],
        vace=None if layers is None else VaceConfig(tuple(layers), values["vace_in_channels"]),
    )


def config_to_json(config: WanConfig) -> dict[str, object]:
    """Make the config for `from_pretrained` of diffusers' `Wan(VACE)Transformer3DModel`."""
    vace = config.vace
    values: dict[str, object] = {
        "_class_name": "WanVACETransformer3DModel" if vace else "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **FIXED,
        "attention_head_dim": config.head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "rope_max_seq_len": config.rope_max_seq_len,
        "text_dim": config.text_dim,
    }
    if vace:
        values |= {"vace_in_channels": vace.in_channels, "vace_layers": list(vace.layers)}
    return values


def config_from_shapes(
    tensors: Mapping[str, Shaped], layout: Layout, values: Mapping[str, Any] | None = None
) -> WanConfig:
    """Infer the config of a file from its tensors, for layouts without a complete config.

    Args:
      tensors: name -> anything with `shape`.
      layout: layout of the names.
      values: `config.json` of the original repository, if there is one. It has the heads, epsilon
        and the layers with hints, which shapes do not determine. Without it, heads have 128
        channels and hints are evenly spaced, as in every published size.

    Raises:
      UserError: a tensor that determines a size is missing, or tensors and config disagree.
    """
    column = 1 if layout == "diffusers" else 2

    def axis(name: str, index: int) -> int:
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) <= index or 0 in shape:
            fault = "of another shape" if shape else "missing"
            raise UserError(f"tensor {name} is {fault}, so that the sizes are not known")
        return int(shape[index])

    def count(stack: str) -> int:
        found = (re.match(rf"{stack}\.(\d+)\.", name) for name in tensors)
        return 1 + max((int(match.group(1)) for match in found if match), default=-1)

    rows = {row[0]: f"{row[column]}.weight" for row in (*TOP_LINEAR, *FEED_FORWARD)}
    width, layers, hints = axis("patch_embedding.weight", 0), count("blocks"), count("vace_blocks")
    if values is None:
        if width % HEAD_DIM:
            raise UserError(
                f"width {width} is no multiple of {HEAD_DIM}; put the config.json of the model "
                "beside it"
            )
        if hints and layers % hints:
            raise UserError(
                f"{hints} VACE blocks do not spread over {layers}; put the config.json of the "
                "model beside it"
            )
        values = {"num_heads": width // HEAD_DIM, "eps": 1e-6}
        if hints:
            values |= {"vace_layers": list(range(0, layers, layers // hints))}
    elif values["dim"] != width or values["num_layers"] != layers:
        raise UserError(
            f"config.json has width {values['dim']} and {values['num_layers']} layers, the tensors "
            f"{width} and {layers}"
        )
    elif bool(values.get("vace_layers")) != bool(hints):
        raise UserError(
            f"config.json and the tensors disagree: {hints} VACE blocks, vace_layers "
            f"{values.get('vace_layers')}"
        )
    return WanConfig(
        num_layers=layers,
        num_heads=values["num_heads"],
        head_dim=width // values["num_heads"],
        ffn_dim=axis(f"blocks.0.{rows['ffn.linear_1']}", 0),
        text_dim=axis(rows["condition_embedder.text_embedder.linear_1"], 1),
        freq_dim=axis(rows["condition_embedder.time_embedder.linear_1"], 1),
        eps=values["eps"],
        in_channels=axis("patch_embedding.weight", 1),
        out_channels=axis(rows["proj_out"], 0) // (PATCH[0] * PATCH[1] * PATCH[2]),
        vace=VaceConfig(tuple(values["vace_layers"]), axis("vace_patch_embedding.weight", 1))
        if hints
        else None,
    )


def config_to_original(config: WanConfig) -> dict[str, object]:
    """Make the `config.json` of the original repository's folder."""
    vace = config.vace
    values: dict[str, object] = {
        "_class_name": "VaceWanModel" if vace else "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "vace" if vace else "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": TEXT_LENGTH,
    }
    if vace:
        values |= {"vace_layers": list(vace.layers), "vace_in_dim": vace.in_channels}
    return values


def scheduler_to_json(shift: float) -> dict[str, object]:
    """Make the `scheduler/scheduler_config.json` of the published Wan pipelines with a shift."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "final_sigmas_type": "zero",
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }
