"""Select the tensors of one network in a file that also holds others.

Training checkpoints hold weights inside mappings (`{"state_dict": ..., "optimizer": ...}`) and
averages of them (`ema.`). ComfyUI packs text encoder and VAE into one file with the transformer.
DDP, FSDP, `torch.compile` and ComfyUI add a prefix to every name, which is removed if all names
have it. The user chooses between several sets of weights; nothing is chosen silently.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from checkpoints_convert import quantized, store
from checkpoints_convert.identify import ADAPTER, PREFIXES, TRANSFORMER, common_prefix, identify
from checkpoints_convert.lazy import LazyTensor
from jax_idgrpo.errors import UserError

AVERAGES = r"(ema|ema_model|model_ema|ema_weights)\."  # prefixes of moving averages
WEIGHTS = "weights"  # name of the tensors beside the averages of a file
PACKED = (  # prefixes of the networks that are packed beside a transformer
    *("vae.", "first_stage_model.", "cond_stage_model.", "conditioner."),
    *("text_encoders.", "text_encoder.", "clip_vision.", "image_encoder."),
)

Values = TypeVar("Values")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user states about a checkpoint.

    Attributes:
      entry: set of weights of a file with several.
      dtype: dtype of dequantized weights.
      base: checkpoint of the plain model under a VACE module.
    """

    entry: str | None = None
    dtype: np.dtype = quantized.DTYPES["float32"]
    base: Path | None = None


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of one network.

    Attributes:
      tensors: tensors by name, without the prefix that all names have.
      notices: lines about what was chosen and left out.
    """

    tensors: dict[str, LazyTensor]
    notices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One set of weights in a file.

    Attributes:
      entry: mapping inside the file, as in `pth.entries`.
      prefix: prefix of a moving average; "" for the weights.
      names: names of its tensors in the mapping.
    """

    entry: str
    prefix: str
    names: list[str]

    @property
    def name(self) -> str:
        """Name for `--entry`."""
        parts = (self.entry, self.prefix.removesuffix("."))
        return ".".join(part for part in parts if part) or WEIGHTS


def read(file: Path, entry: str | None = None) -> Contents:
    """Select the tensors of the network in a file.

    Args:
      file: file of weights or index.
      entry: name of the set of weights, if the file holds several.

    Raises:
      UserError: the file holds several sets of weights and no entry is given, it has no such entry,
        or its weights are quantised in a format that is not read.
    """
    inside = store.entries(file)
    whole, metadata = ({}, {}) if inside else store.open_weights(file)
    quantized.refuse(whole, file, metadata)
    candidates = _candidates(inside or {"": list(whole)})
    if entry is None and not candidates:
        return Contents(_unwrapped(store.open_file(file)[0] if inside else whole, file))
    chosen = _choose(candidates, entry, file)
    found = store.open_weights(file, chosen.entry)[0] if inside else whole
    if inside:
        quantized.refuse(found, file)
    tensors = {name.removeprefix(chosen.prefix): found[name] for name in chosen.names}
    notices = []
    if chosen.name != WEIGHTS:
        others = [other.name for other in candidates if other != chosen]
        rest = "; the rest of the file is left out" if inside else ""
        left = f"; left out: {', '.join(others)}" if others else rest
        what = " (a moving average)" if chosen.prefix else ""
        notices.append(f"its entry {chosen.name}{what} is taken{left}")
    tensors, packed = _unpacked(tensors)
    if packed:
        listed = ", ".join(f"{name} ({packed[name]} tensors)" for name in sorted(packed))
        notices.append(f"the transformer of a packed file is taken; left out: {listed}")
    return Contents(_unwrapped(tensors, file), tuple(notices))


def _candidates(entries: Mapping[str, list[str]]) -> list[Candidate]:
    """List the sets of weights of known networks in the mappings of a file."""
    candidates: list[Candidate] = []
    for entry, names in entries.items():
        groups: dict[str, list[str]] = collections.defaultdict(list)
        for name in names:
            average = re.match(AVERAGES, name)
            groups[average[0] if average else ""].append(name)
        averages = [
            Candidate(entry, prefix, group)
            for prefix, group in groups.items()
            if prefix and _is_network(name.removeprefix(prefix) for name in group)
        ]
        apart = {name for average in averages for name in average.names}
        rest = [name for name in names if name not in apart]
        if _is_network(rest):
            candidates.append(Candidate(entry, "", rest))
        candidates += averages
    return candidates


def _is_network(names: Iterable[str]) -> bool:
    own, _ = _unpacked(dict.fromkeys(names))
    prefix = common_prefix(own)
    return identify(name.removeprefix(prefix) for name in own) is not None


def _choose(candidates: list[Candidate], entry: str | None, file: Path) -> Candidate:
    by_name = {candidate.name: candidate for candidate in candidates}
    listed = ", ".join(by_name)
    if entry is None and len(candidates) == 1:
        return candidates[0]
    if entry is None:
        raise UserError(
            f"{file}: holds {len(candidates)} sets of weights: {listed}; choose one with "
            f"idgrpo-convert import {file} STORE --entry NAME"
        )
    if entry not in by_name:
        what = f"has no entry {entry!r} with weights"
        remedy = f"choose one of {listed}" if listed else "leave --entry out"
        raise UserError(f"{file}: {what}; {remedy}")
    return by_name[entry]


def _unpacked(tensors: dict[str, Values]) -> tuple[dict[str, Values], dict[str, int]]:
    """Take a transformer out of a file that also holds other networks.

    Returns:
      (tensors of the transformer, number of tensors of every other network); (all tensors, {}) for
      any other file.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PACKED)}
    if len(own) in (0, len(tensors)):
        return tensors, {}
    prefix = common_prefix(own)
    identified = identify(name.removeprefix(prefix) for name in own)
    if identified is None or identified[0] != TRANSFORMER:
        return tensors, {}
    others = collections.Counter(name.partition(".")[0] for name in tensors if name not in own)
    return own, dict(others)


def _unwrapped(tensors: dict[str, LazyTensor], file: Path) -> dict[str, LazyTensor]:
    """Remove the prefix that all names have.

    Raises:
      UserError: only some names have the prefix.
    """
    prefix = common_prefix(tensors)
    counts = {name: sum(tensor.startswith(name) for tensor in tensors) for name in PREFIXES}
    found = max(counts, key=lambda name: counts[name])
    identified = identify(tensors)
    if not prefix and 2 * counts[found] > len(tensors) and (identified or [None])[0] != ADAPTER:
        odd = next((name for name in tensors if not name.startswith(found)), None)
        rest = [name.removeprefix(found) for name in tensors if name.startswith(found)]
        if odd is not None and identify(rest) is not None:
            raise UserError(
                f"{file}: {counts[found]} tensors have names that start with {found!r}, {odd} does "
                "not; save the weights of one network"
            )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
