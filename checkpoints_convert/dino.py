"""Define the names of DINO's vision transformer in transformers' `ViTModel` (`facebook/dino-vits16`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from checkpoints_convert import rules, store
from checkpoints_convert.network import naming
from checkpoints_convert.rules import TABLE, VECTOR, Op, Rule, linear
from jax_idgrpo.models.dino import Dino, DinoConfig

CLASS_TOKEN = Op((0, 1, 2), (3,), (1, 1, None))  # [1, 1, D] -> [D]
IGNORED = "pooler."  # prefix of a layer that DINO was not trained with
FIXED = {"model_type": "vit", "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True}
LAYERS = (
    ("attention.attention.query", "attention.query"),
    ("attention.attention.key", "attention.key"),
    ("attention.attention.value", "attention.value"),
    ("attention.output.dense", "attention.output"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
)
NORMS = (("layernorm_before", "norm1"), ("layernorm_after", "norm2"))


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}.scale", VECTOR),
        Rule(f"{theirs}.bias", f"{ours}.bias", VECTOR),
    ]


def table(config: DinoConfig) -> list[Rule]:
    """List the rules of all tensors of the network."""
    patch, embeddings = config.patch, "embeddings.patch_embeddings.projection"
    # [D, C, h, w] with kernel = stride to [h w C, D]
    patches = Op((2, 3, 1, 0), (3, 1), (None, 3, patch, patch))
    block, ours = "encoder.layer.{i}", "blocks.{i}"
    return [
        Rule("embeddings.cls_token", "class_token", CLASS_TOKEN),
        Rule("embeddings.position_embeddings", "positions", TABLE),
        Rule(f"{embeddings}.weight", "patches.kernel", patches),
        Rule(f"{embeddings}.bias", "patches.bias", VECTOR),
        *(rule for one, two in LAYERS for rule in linear(f"{block}.{one}", f"{ours}.{two}")),
        *(rule for one, two in NORMS for rule in _norm(f"{block}.{one}", f"{ours}.{two}")),
        *_norm("layernorm", "norm"),
    ]


def config_from_json(values: dict[str, Any]) -> DinoConfig:
    """Read a `config.json` of transformers' `ViTModel`.

    Raises:
      ValueError: the file describes another architecture.
      KeyError: a field is missing.
    """
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}, only {value!r} is supported")
    return DinoConfig(
        depth=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        ffn=values["intermediate_size"],
        patch=values["patch_size"],
        image_size=values["image_size"],
        eps=values["layer_norm_eps"],
    )


def config_to_json(config: DinoConfig) -> dict[str, object]:
    """Make the `config.json` for transformers' `ViTModel.from_pretrained`."""
    return {
        **FIXED,
        "architectures": ["ViTModel"],
        "num_hidden_layers": config.depth,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "layer_norm_eps": config.eps,
    }


def load(folder: Path) -> Dino:
    """Read the network of a folder with `config.json` and the weights, as transformers saves it.

    Raises:
      UserError: a file is missing, damaged, or holds another network.
    """
    file = folder / "config.json"
    values = store.read_json(file)
    with naming(file):
        config = config_from_json(values)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Dino(config, rngs=nnx.Rngs(0))))
    tensors = {
        name: tensor
        for name, tensor in store.open_tensors(folder).items()
        if not name.startswith(IGNORED)
    }
    return nnx.merge(graph, rules.to_jax(table(config), tensors, abstract, str(folder)))


def save(network: Dino, folder: Path) -> None:
    """Write a folder that `load` and transformers' `ViTModel.from_pretrained` read."""
    tensors = rules.to_torch(table(network.config), nnx.state(network))
    store.write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    store.write_json(folder / "config.json", config_to_json(network.config))
