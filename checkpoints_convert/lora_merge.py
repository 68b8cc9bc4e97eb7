"""Merge LoRA files into the weights of a transformer.

    LoRA        W += s (alpha / R) B A, and with biases of LoRA  b += s (alpha / R) b_B
    DoRA        W += s (m V / |V| - W),  V = W + (alpha / R) B A
    diff        W += s D, and the same for biases (diff_b) and modulations (diff_m)

s is the strength that the user gives. |V| is the norm of every row of V if m has one number per
output, as in peft, or of every column. Sums are in float32, results have the dtype of the base.

Sources: DoRA, arXiv 2402.09353; peft `tuners/lora/dora.py`; Comfy-Org/ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from checkpoints_convert import lora_checks, lora_names, rules, wan
from checkpoints_convert.adapter import LoRAFile, open_lora_file
from checkpoints_convert.lazy import LazyTensor, finite
from checkpoints_convert.lora_dialects import Kind
from checkpoints_convert.network import Moved, Network
from checkpoints_convert.rules import Slot
from jax_idgrpo.errors import UserError

# What a tensor of a LoRA changes: the ends of the changed tensor's name in the layouts.
CHANGED: dict[Kind, tuple[str, ...]] = {
    "a": ("weight",),
    "diff": ("weight",),
    "bias": ("bias",),
    "diff_b": ("bias",),
    "diff_m": ("modulation", "scale_shift_table"),
}


@dataclasses.dataclass(frozen=True)
class Merge:
    """A LoRA file to merge.

    Attributes:
      file: the file.
      scale: strength.
    """

    file: LoRAFile
    scale: float = 1.0

    @property
    def described(self) -> dict[str, object]:
        """Name and strength, for the record of a store."""
        return {"file": self.file.weights.name, "scale": self.scale}


def open_merge(path: str | Path, scale: float = 1.0) -> Merge:
    """Open a LoRA file to merge, of any dialect, perhaps with diffs, biases or DoRA.

    Raises:
      UserError: as in `open_lora_file`.
    """
    return Merge(open_lora_file(path, merge=True), scale)


@dataclasses.dataclass(frozen=True)
class Change:
    """What one file changes in one tensor of the base, in torch's layout.

    Attributes:
      strength: factor of the whole change.
      parts: the tensors; "a" and "b" form a product, "diff", "bias" and the others are added.
      scale: alpha / R of the product and of the bias.
    """

    strength: float
    parts: Mapping[Kind, LazyTensor]
    scale: float = 1.0

    @property
    def origin(self) -> str:
        """File and name of the first tensor, for messages."""
        return next(iter(self.parts.values())).origin

    def apply(self, base: np.ndarray) -> np.ndarray:
        """Return the changed tensor, float32."""
        if "b" not in self.parts:
            ((kind, tensor),) = self.parts.items()
            factor = self.scale if kind == "bias" else 1.0
            return base + np.float32(self.strength * factor) * _read(tensor).reshape(base.shape)
        a, b = _read(self.parts["a"]), _read(self.parts["b"])
        product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        if (magnitude := self.parts.get("magnitude")) is None:
            scale = np.float32(self.strength * self.scale)
            return base + scale * product.reshape(base.shape)
        whole = base.reshape(len(base), -1)
        moved = whole + np.float32(self.scale) * product
        m = _read(magnitude)
        by_column = m.shape[0] == 1 and m.size == moved.shape[1]
        norm = np.linalg.norm(moved, axis=0 if by_column else 1, keepdims=True)
        m = m.reshape(norm.shape)
        directed = m * moved / np.maximum(norm, np.finfo(np.float32).tiny)
        return (whole + np.float32(self.strength) * (directed - whole)).reshape(base.shape)


def _read(tensor: LazyTensor) -> np.ndarray:
    values = np.asarray(tensor)
    if not finite(values):
        raise UserError(f"{tensor.origin} holds NaN or infinite values; get the file again")
    return values.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A parameter of the base with all changes, in our layout.

    Attributes:
      base: the parameter.
      slot: moves its axes to torch's layout and back.
      changes: in order.
    """

    base: Moved
    slot: Slot
    changes: tuple[Change, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def origin(self) -> str:
        return f"{self.base.origin} with {self.changes[0].origin}"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values = self.slot.op.invert(np.asarray(self.base)).astype(np.float32)
        for change in self.changes:
            values = change.apply(values)
        values = self.slot.op.apply(values).astype(self.dtype)
        return np.asarray(values, dtype=dtype, copy=copy)


def merged(
    network: Network, parameters: Mapping[str, Moved], merges: Sequence[Merge]
) -> dict[str, Merged]:
    """Return the parameters of the transformer that LoRA files change, by our names.

    Args:
      network: the transformer.
      parameters: its parameters, by our names.
      merges: the files, in order.

    Raises:
      UserError: a file does not fit the transformer.
    """
    slots = {
        slot.torch.replace(".", "_"): slot
        for layout in ("diffusers", "original")
        for slot in rules.expand(wan.rules(network.config, layout), network.shapes)
    }
    found: dict[str, tuple[Slot, list[Change]]] = {}
    for merge in merges:
        _refuse_misfit(merge, network)
        for slot, change in _changes(merge, slots, network):
            found.setdefault(slot.name, (slot, []))[1].append(change)
    return {
        name: Merged(parameters[name], slot, tuple(changes))
        for name, (slot, changes) in found.items()
    }


def _refuse_misfit(merge: Merge, network: Network) -> None:
    """Raise a UserError for a LoRA of another model."""
    tensors = merge.file.tensors
    matrices = {
        layer: (parts["a"], tensors[parts["a"]], parts["b"], tensors[parts["b"]])
        for module, parts in merge.file.parsed.modules.items()
        if "a" in parts and (layer := lora_names.find(module)) is not None
    }
    if (what := lora_checks.misfit(matrices, network.config)) is not None:
        raise UserError(
            f"{merge.file.weights} on {network.source}: {what}; give an adapter of this model"
        )


def _changes(
    merge: Merge, slots: Mapping[str, Slot], network: Network
) -> list[tuple[Slot, Change]]:
    """Pair what a file changes with the tensors of the base."""
    found = []
    for module, parts in merge.file.parsed.modules.items():
        tensors = {kind: merge.file.tensors[name] for kind, name in parts.items()}
        rank, alpha = merge.file.scales.get(module, (1, 1.0))
        for kind, ends in CHANGED.items():
            if kind not in tensors:
                continue
            flat = module.replace(".", "_")
            slot = next((slots[f"{flat}_{end}"] for end in ends if f"{flat}_{end}" in slots), None)
            where = f"{merge.file.weights}: tensor {parts[kind]}"
            if slot is None:
                raise UserError(
                    f"{where} changes {module}, which {network.source} does not have; give a LoRA "
                    "of this model"
                )
            product: tuple[Kind, ...] = ("a", "b", "magnitude")
            used = product if kind == "a" else (kind,)
            chosen = {part: tensors[part] for part in used if part in tensors}
            _require_size(where, kind, chosen, slot)
            found.append((slot, Change(merge.scale, chosen, alpha / rank)))
    return found


def _require_size(where: str, kind: Kind, parts: Mapping[Kind, LazyTensor], slot: Slot) -> None:
    """Raise a UserError for tensors that are not of the size of what they change."""
    if kind == "a":
        got = [parts["b"].shape[0], int(np.prod(parts["a"].shape[1:]))]
        want = [slot.torch_shape[0], int(np.prod(slot.torch_shape[1:]))]
    else:
        got, want = [int(np.prod(parts[kind].shape))], [int(np.prod(slot.torch_shape))]
    if got != want:
        raise UserError(
            f"{where} changes {got} values of {slot.torch}, which has {want}; give a "
            "LoRA of this model"
        )
    if (m := parts.get("magnitude")) is not None and int(np.prod(m.shape)) not in want:
        raise UserError(
            f"{where}: its magnitude {m.name} has {int(np.prod(m.shape))} numbers for {want}; "
            "give a LoRA of this model"
        )
