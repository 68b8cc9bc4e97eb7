"""Check LoRA files: explain why one cannot be read, or does not fit a transformer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from checkpoints_convert import lora_names, rules
from checkpoints_convert.lazy import Described, Shaped
from checkpoints_convert.lora import MERGE
from checkpoints_convert.lora_dialects import Kind, Parsed
from checkpoints_convert.lora_names import Layer
from jax_idgrpo.models.wan import STACKS, WanConfig

LYCORIS = r"(^|\.)(lokr|hada|oft|boft|glora)_|^lycoris_"
START = r"(?P<start>.*?)(vace_)?blocks[._]\d"

# What a tensor is, what its file then is, and the remedy: files that can only be merged.
MERGED_ONLY: tuple[tuple[frozenset[Kind], str], ...] = (
    (frozenset({"magnitude"}), "is a DoRA adapter, not a plain LoRA"),
    (
        frozenset({"diff", "diff_b", "diff_m"}),
        "holds diff and diff_b tensors, which are not LoRA (a distilled model)",
    ),
    (
        frozenset({"bias"}),
        "has biases beside its matrices (lora_bias), and only plain LoRA is read",
    ),
)


def complaint(parsed: Parsed, tensors: Mapping[str, Described]) -> str | None:
    """Explain why a file is no LoRA that can be read or merged, with the remedy; None if it is one.

    Args:
      parsed: the names of the file.
      tensors: tensors by name.
    """
    if any(re.search(LYCORIS, name) for name in tensors):
        return "is a LyCORIS adapter such as LoKr or LoHa, not a LoRA; train a plain LoRA"
    if not parsed.modules:
        return "has no tensor named *.lora_A.weight; give a LoRA"
    if parsed.twice is not None:
        return "holds two adapters, with {} and {}; save one".format(*parsed.twice)
    if others := [name for name in parsed.others if not _is_counter(tensors[name])]:
        return f"holds {listed(others)} beside the LoRA; save only the LoRA"
    for module, parts in parsed.modules.items():
        for kind, other in (("a", "b"), ("b", "a")):
            if kind in parts and other not in parts:
                what = {"a": "lora_A (or lora_down)", "b": "lora_B (or lora_up)"}[other]
                return f"has {parts[kind]} without its {what}; get the file again"
        for kind in ("alpha", "bias", "magnitude"):
            if kind in parts and "a" not in parts:
                return f"has {parts[kind]} without matrices of {module}; get the file again"
        if "a" in parts:
            a, b = (tensors[parts[kind]].shape for kind in ("a", "b"))
            if len(a) < 2 or len(b) < 2:
                name = parts["a" if len(a) < 2 else "b"]
                return f"tensor {name} has shape {list(tensors[name].shape)}, not that of a matrix"
            if a[0] != b[1] or a[0] == 0:
                return (
                    f"{parts['a']} has rank {a[0]} and {parts['b']} has rank {b[1]}; get the file "
                    "again"
                )
    return None


def not_plain(parsed: Parsed, tensors: Mapping[str, Shaped]) -> str | None:
    """Explain why a LoRA file is no adapter of linear layers, with the remedy; None if it is one."""
    for kinds, what in MERGED_ONLY:
        if any(kinds & parts.keys() for parts in parsed.modules.values()):
            return f"{what}; {MERGE}"
    for module, parts in parsed.modules.items():
        name = parts["a"]
        if lora_names.find(module) is None:
            match = re.match(START, name)
            if match is not None and match["start"] != parsed.dialect.prefix:
                return (
                    f"has names that start with {match['start']!r}, such as {name}, which no known "
                    "program writes; rename its tensors"
                )
            return f"adapts {module}, which is no linear layer of the transformer; {MERGE}"
        for part in (parts["a"], parts["b"]):
            if len(tensors[part].shape) != 2:
                return f"tensor {part} has shape {list(tensors[part].shape)}, not that of a matrix"
    return None


def misfit(
    matrices: Mapping[Layer, tuple[str, Shaped, str, Shaped]], config: WanConfig
) -> str | None:
    """Explain why an adapter does not fit this transformer; None if it does.

    Layers and blocks without LoRA are no misfit: the adapter leaves them as they are.

    Args:
      matrices: name and tensor of A and of B, in torch's layout, of every adapted layer.
      config: sizes of the transformer.
    """
    counts = dict.fromkeys(STACKS, 0)
    for layer in matrices:
        stack = layer.leaf.partition(".")[0]
        if layer.block is not None:
            counts[stack] = max(counts[stack], layer.block + 1)
    if counts["vace_blocks"] and config.vace is None:
        return "made for a VACE model, this one has no VACE blocks (plain Wan or Phantom)"
    for layer, (a, down, b, up) in matrices.items():
        inputs, outputs = lora_names.shape(layer, config)
        for name, size, wanted in ((a, down.shape[1], inputs), (b, up.shape[0], outputs)):
            if size != wanted:
                what = f"made for width {size}, this model has {wanted}"
                return f"{what} (tensor {name})"
    for stack, count in counts.items():
        if count > config.depth(stack):
            last = next(
                a
                for layer, (a, *_) in matrices.items()
                if (layer.leaf.partition(".")[0], layer.block) == (stack, count - 1)
            )
            what = f"made for {count} {stack}, this model has {config.depth(stack)}"
            return f"{what} (tensor {last})"
    return None


def listed(items: Iterable[object]) -> str:
    """Join at most `rules.LISTED` of the items with commas."""
    texts = [str(item) for item in items]
    return ", ".join(texts[: rules.LISTED]) + (", ..." if len(texts) > rules.LISTED else "")


def _is_counter(tensor: Described) -> bool:
    """Return whether a tensor is an integer scalar, such as the number of a step."""
    return not tensor.shape and bool(np.issubdtype(tensor.dtype, np.integer))
