"""Define the names of the UMT5 encoder in transformers and in the original Wan release.

One row per tensor: our name, transformers', the original. Sources: transformers `modeling_umt5.py`;
Wan2.1 `wan/modules/t5.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from checkpoints_convert.lazy import Shaped
from checkpoints_convert.rules import MATRIX, TRANSPOSE, VECTOR, Rule
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.umt5 import UMT5Config

Layout = Literal["transformers", "original"]

FIXED = {"is_gated_act": True, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu"}

# The decoder of google/umt5-xxl, and ComfyUI's copy of the tokenizer.
IGNORED = ("decoder.", "lm_head.", "spiece_model")
MAX_DISTANCE = 128  # of every published size; shapes do not determine it
TIED = "encoder.embed_tokens.weight"  # a second name of transformers' shared.weight in some files
EMBEDDING = ("embedding", "shared.weight", "token_embedding.weight")
NORM = ("norm.scale", "encoder.final_layer_norm.weight", "norm.weight")
BLOCK = (
    ("norm1.scale", "layer.0.layer_norm", "norm1", VECTOR),
    ("attention.q.kernel", "layer.0.SelfAttention.q", "attn.q", TRANSPOSE),
    ("attention.k.kernel", "layer.0.SelfAttention.k", "attn.k", TRANSPOSE),
    ("attention.v.kernel", "layer.0.SelfAttention.v", "attn.v", TRANSPOSE),
    ("attention.o.kernel", "layer.0.SelfAttention.o", "attn.o", TRANSPOSE),
    (
        "attention.relative_bias",
        "layer.0.SelfAttention.relative_attention_bias",
        "pos_embedding.embedding",
        MATRIX,
    ),
    ("norm2.scale", "layer.1.layer_norm", "norm2", VECTOR),
    ("ffn.gate.kernel", "layer.1.DenseReluDense.wi_0", "ffn.gate.0", TRANSPOSE),
    ("ffn.up.kernel", "layer.1.DenseReluDense.wi_1", "ffn.fc1", TRANSPOSE),
    ("ffn.down.kernel", "layer.1.DenseReluDense.wo", "ffn.fc2", TRANSPOSE),
)


def rules(config: UMT5Config, layout: Layout = "transformers") -> list[Rule]:
    """List the rules of all tensors of the encoder in a layout."""
    column, stack = (1, "encoder.block") if layout == "transformers" else (2, "blocks")
    return [
        Rule(
            EMBEDDING[column],
            EMBEDDING[0],
            MATRIX,
            aliases=(TIED,) if layout == "transformers" else (),
        ),
        Rule(NORM[column], NORM[0], VECTOR),
        *(
            Rule(f"{stack}.{{i}}.{row[column]}.weight", f"blocks.{{i}}.{row[0]}", row[3])
            for row in BLOCK
        ),
    ]


def config_from_json(values: dict[str, Any]) -> UMT5Config:
    """Read a `text_encoder/config.json` of transformers.

    Raises:
      ValueError: the file describes another architecture.
      KeyError: a field is missing.
    """
    for name, value in {"model_type": "umt5", **FIXED}.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}, only {value!r} is supported")
    return UMT5Config(
        vocab_size=values["vocab_size"],
        d_model=values["d_model"],
        d_kv=values["d_kv"],
        num_heads=values["num_heads"],
        d_ff=values["d_ff"],
        num_layers=values["num_layers"],
        num_buckets=values["relative_attention_num_buckets"],
        max_distance=values["relative_attention_max_distance"],
        eps=values["layer_norm_epsilon"],
    )


def config_from_shapes(tensors: Mapping[str, Shaped], layout: Layout) -> UMT5Config:
    """Infer the config of a file without one from its tensors.

    Raises:
      UserError: a tensor that determines a size is missing.
    """
    column, stack = (1, "encoder.block") if layout == "transformers" else (2, "blocks")
    rows = {row[0]: f"{stack}.0.{row[column]}.weight" for row in BLOCK} | {
        EMBEDDING[0]: EMBEDDING[column]
    }
    shapes = {}
    for ours in ("embedding", "attention.q.kernel", "attention.relative_bias", "ffn.gate.kernel"):
        shapes[ours] = tuple(tensors[rows[ours]].shape) if rows[ours] in tensors else ()
        if len(shapes[ours]) != 2 or 0 in shapes[ours]:
            raise UserError(
                f"tensor {rows[ours]} is missing or no matrix, so that the sizes are not known"
            )
    buckets, heads = shapes["attention.relative_bias"]
    found = (re.match(rf"{re.escape(stack)}\.(\d+)\.", name) for name in tensors)
    return UMT5Config(
        vocab_size=shapes["embedding"][0],
        d_model=shapes["embedding"][1],
        d_kv=shapes["attention.q.kernel"][0] // heads,
        num_heads=heads,
        d_ff=shapes["ffn.gate.kernel"][0],
        num_layers=1 + max(int(match.group(1)) for match in found if match),
        num_buckets=buckets,
        max_distance=MAX_DISTANCE,
        eps=1e-6,
    )


def config_to_json(config: UMT5Config) -> dict[str, object]:
    """Make the config for transformers' `UMT5EncoderModel.from_pretrained`."""
    return {
        **FIXED,
        "architectures": ["UMT5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
