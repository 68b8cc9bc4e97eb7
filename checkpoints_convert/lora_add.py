"""Add adapters, each at a strength, to one adapter.

sum_k s_k (alpha_k / R_k) (x A_k) B_k is one adapter whose A are the A_k side by side, whose B are
the scaled B_k one below the other, and whose alpha is its rank. A layer that only some adapters
have keeps their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert import adapter, lora, lora_dialects, store
from checkpoints_convert.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints_convert.lazy import Tensor, finite
from checkpoints_convert.lora import Scale, Scales
from checkpoints_convert.lora_names import Layer
from jax_idgrpo.errors import UserError

Parts = tuple[Scales, Mapping[str, Tensor]]
"""Rank and alpha of every layer, and A [R,in] and B [out,R] by our names."""


def read_parts(path: Path) -> Parts:
    """Read an adapter of any dialect.

    Raises:
      UserError: it cannot be read, or holds values that are not finite.
    """
    found = adapter.open_adapter(path)
    matrices = {slot.name: tensor for slot, tensor in found.matched()}
    for tensor in matrices.values():
        if not finite(np.asarray(tensor)):
            raise UserError(f"{tensor.origin} holds NaN or infinite values; get the file again")
    return found.config, matrices


def added(parts: Sequence[tuple[Parts, float]]) -> tuple[dict[Layer, Scale], dict[str, Tensor]]:
    """Add adapters; their strengths and scales go into B, in float32."""
    downs: dict[Layer, list[np.ndarray]] = {}
    ups: dict[Layer, list[np.ndarray]] = {}
    for (scales, matrices), strength in parts:
        for layer, (rank, alpha) in scales.items():
            a, b = (
                np.asarray(matrices[f"{layer.name}.lora_{part}"]).astype(np.float32)
                for part in "ab"
            )
            downs.setdefault(layer, []).append(a)
            ups.setdefault(layer, []).append(np.float32(strength * alpha / rank) * b)
    matrices = {}
    for layer in downs:
        matrices[f"{layer.name}.lora_a"] = np.concatenate(downs[layer])
        matrices[f"{layer.name}.lora_b"] = np.concatenate(ups[layer], axis=1)
    ranks = {layer: sum(map(len, each)) for layer, each in downs.items()}
    return {layer: Scale(rank, float(rank)) for layer, rank in ranks.items()}, matrices


def write_added(parts: Sequence[tuple[Path, float]], destination: Path) -> None:
    """Write the sum of adapters as a PEFT directory.

    Args:
      parts: adapters of one model, and their strengths.
      destination: folder to write.

    Raises:
      UserError: an adapter cannot be read, or two of them are for models of different widths.
    """
    read = [(read_parts(path), strength) for path, strength in parts]
    (_, first), _ = read[0]
    for (path, _), ((_, matrices), _) in zip(parts, read, strict=True):
        for name in sorted(first.keys() & matrices.keys()):
            axis = 1 if name.endswith("lora_a") else 0
            if (width := matrices[name].shape[axis]) != first[name].shape[axis]:
                raise UserError(
                    f"{path}: its {name} is {width} wide, that of {parts[0][0]} "
                    f"{first[name].shape[axis]}; add adapters of one model"
                )
    scales, matrices = added(read)
    with store.atomic_path(destination, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, lora.config_to_json(scales))
        peft = lora_dialects.PEFT
        tensors = {
            peft.spelled(layer, ending): matrices[f"{layer.name}.lora_{part}"]
            for layer in scales
            for part, ending in (("a", peft.a), ("b", peft.b))
        }
        store.write_file(new / ADAPTER_WEIGHTS, tensors, check=True)
