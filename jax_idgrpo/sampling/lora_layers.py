"""Choose the linear layers that have LoRA, with their ranks and alphas, from a configuration."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from checkpoints_convert import lora, lora_names
from checkpoints_convert.lora_names import Layer
from jax_idgrpo.config import ModelConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.wan import WanConfig

Number = TypeVar("Number", int, float)


def configured(model: ModelConfig, config: WanConfig) -> lora.Fields:
    """Resolve the patterns of `model` for the transformer of `config`.

    Raises:
      UserError: a pattern matches no layer.
    """
    known = lora_names.layers(config)
    patterns = [text for part in model.lora_targets.split(",") if (text := part.strip())]
    for pattern in patterns:
        _require_match("lora_targets", pattern, known, "linear layer of the transformer")
    chosen = [layer for layer in known if any(matches(layer, text) for text in patterns)]
    if not chosen:
        raise UserError("config: model.lora_targets names no layer; use patterns such as to_q,to_v")
    for field in ("lora_ranks", "lora_alphas"):
        for pattern in getattr(model, field):
            _require_match(field, pattern, chosen, "layer of model.lora_targets")
    scales = {
        layer: lora.Scale(
            _first(model.lora_ranks, layer, model.rank),
            float(_first(model.lora_alphas, layer, model.alpha)),
        )
        for layer in chosen
    }
    return lora.fields(scales, config)


def matches(layer: Layer, pattern: str) -> bool:
    """Return whether a pattern matches a name of the layer, or the end of one after a dot."""
    names = (layer.spelled(column) for column in range(len(layer.row)))
    return any(fnmatch.fnmatchcase(f".{name}", f"*.{pattern}") for name in names)


def _require_match(field: str, pattern: str, layers: Iterable[Layer], what: str) -> None:
    if not any(matches(layer, pattern) for layer in layers):
        raise UserError(
            f"config: model.{field}: {pattern!r} matches no {what}; use names such as to_q, "
            "attn2.*, ffn.*, vace_blocks.*"
        )


def _first(values: Mapping[str, Number], layer: Layer, default: Number) -> Number:
    """Return the value of the first pattern that matches a layer."""
    return next((value for text, value in values.items() if matches(layer, text)), default)
