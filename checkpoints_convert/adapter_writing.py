"""Write adapters in the dialects of `lora_dialects`, with every bit of A and B and every alpha."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoints_convert import lora, lora_dialects, store
from checkpoints_convert.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints_convert.card import FILE as CARD
from checkpoints_convert.lazy import Tensor
from checkpoints_convert.lora_dialects import Dialect
from checkpoints_convert.network import Network, published
from checkpoints_convert.rules import TRANSPOSE, Rule

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
FORMATS = {  # name of an export -> its dialect
    "peft": lora_dialects.PEFT,
    "diffusers-lora": lora_dialects.DIFFUSERS_LORA,
    "comfyui": lora_dialects.COMFYUI,
    "kohya": lora_dialects.KOHYA,
}


def tensors_of(network: Network, dialect: Dialect) -> dict[str, Tensor]:
    """Return the tensors of an adapter with the names of a dialect, and its alphas if it has any.

    An alpha is a float32 number, like those of ComfyUI's and kohya's files.
    """
    table = [
        Rule(dialect.spelled(layer, ending), f"{layer.name}.lora_{part}", TRANSPOSE)
        for layer in network.config
        for part, ending in (("a", dialect.a), ("b", dialect.b))
    ]
    tensors: dict[str, Tensor] = dict(published(network, table))
    if dialect.alphas:
        tensors |= {
            dialect.spelled(layer, "alpha"): np.asarray(scale.alpha, np.float32)
            for layer, scale in network.config.items()
        }
    return tensors


def write_peft(network: Network, destination: Path, card: str | None = None) -> None:
    """Write a PEFT directory, which `peft` and this project read; dtypes are kept.

    Args:
      network: the adapter.
      destination: folder to write.
      card: text of the model card, if any.
    """
    with store.atomic_path(destination, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, dict(network.values))
        store.write_file(new / ADAPTER_WEIGHTS, tensors_of(network, lora_dialects.PEFT), check=True)
        if card is not None:
            (new / CARD).write_text(card, "utf-8")


def write_file(network: Network, destination: Path, form: str, card: str) -> None:
    """Write a folder with one file of weights and a model card.

    diffusers' file has ranks and alphas in its header. ComfyUI's and kohya's have the name of the
    folder, so that they can be copied to a folder of LoRAs.

    Args:
      network: the adapter.
      destination: folder to write.
      form: a name in `FORMATS` other than "peft".
      card: text of the model card.
    """
    own = form == "diffusers-lora"
    name = DIFFUSERS_LORA if own else f"{destination.name}.safetensors"
    header = lora.header(network.config) if own else _training_header(network.config)
    with store.atomic_path(destination, name) as new:
        new.mkdir()
        store.write_file(new / name, tensors_of(network, FORMATS[form]), header, check=True)
        (new / CARD).write_text(card, "utf-8")


def _training_header(scales: lora.Scales) -> Mapping[str, str]:
    """Make the header fields by which kohya's and ComfyUI's programs list a LoRA."""
    rank, alpha = lora.common(scales)
    return {
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora_wan",
    }
