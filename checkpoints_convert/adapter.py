"""LoRA adapters on disk: which file, of which rank and alpha, and the tensors opened as a network."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints_convert import lora, rules, store
from checkpoints_convert.identify import ADAPTER
from checkpoints_convert.network import Network, naming
from jax_idgrpo.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """(weights, PEFT config or None) of an adapter folder or file."""
    weights = path
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        weights = path / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise UserError(f"{weights}: no such file beside {ADAPTER_CONFIG}; get the whole adapter folder")
    else:
        weights = store.weights_file(path)
    config = weights.parent / ADAPTER_CONFIG
    return weights, config if weights.name == ADAPTER_WEIGHTS and config.exists() else None


def adapter_scale(path: Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter: from the PEFT config, the file's header, or, without either, alpha = rank."""
    weights, config = adapter_files(path)
    tensors, metadata = store.open_file(weights)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight") and tensor.shape}
    if len(ranks) != 1:
        found = f"ranks {sorted(ranks)}" if ranks else "no tensor named *.lora_A.weight"
        raise UserError(f"{weights}: {found}; it should be a LoRA of one rank")
    rank = ranks.pop()
    if config is None and lora.HEADER not in metadata:
        return rank, float(rank)
    file = weights if config is None else config
    with naming(file):
        if config is None:
            stated, alpha = lora.scale_from_header(json.loads(metadata[lora.HEADER]))
        else:
            stated, alpha = lora.scale_from_json(store.read_json(config))
    if stated != rank:
        raise UserError(f"{file}: says rank {stated}, the tensors of {weights.name} have {rank}; get both files again")
    return rank, alpha


def open_adapter(path: Path) -> Network:
    """A LoRA adapter: a PEFT folder, or a safetensors file with PEFT's, diffusers' or no prefix."""
    weights, config = adapter_files(path)
    rank, alpha = adapter_scale(path)
    tensors, _ = store.open_file(weights)
    prefix = lora.prefix(tensors)
    table = lora.rules(lora.stacks_of(tensors, prefix), prefix)
    return Network(
        part=ADAPTER,
        layout="peft" if config is not None else "diffusers-lora",
        config=(rank, alpha),
        values=lora.config_to_json(rank, alpha),
        table=table,
        shapes=rules.infer(table, tensors, str(weights)),
        tensors=tensors,
        source=weights,
    )
