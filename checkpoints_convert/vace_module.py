"""Lay a file of VACE blocks alone over the transformer of a plain text-to-video model.

Kijai publishes the VACE part of Wan 2.1 by itself: `vace_blocks.*` and `vace_patch_embedding.*`,
with the original names. The main blocks come from the T2V checkpoint in any layout.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from checkpoints_convert import rules, wan
from checkpoints_convert.identify import FAMILIES, TRANSFORMER
from checkpoints_convert.lazy import FileTensor
from checkpoints_convert.network import Network, shapes_of
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.wan import VaceConfig, WanConfig

EMBEDDING = "vace_patch_embedding.weight"


def overlay(module: Mapping[str, FileTensor], layout: str, base: Network, file: Path) -> Network:
    """Add the VACE part to a plain transformer.

    Args:
      module: tensors of the VACE part, by name.
      layout: layout of these names, diffusers or original.
      base: transformer without VACE blocks.
      file: file of the VACE part, for messages.

    Returns:
      The VACE transformer, in the layout of `base`.

    Raises:
      UserError: the parts do not fit.
    """
    if base.part != TRANSFORMER or base.config.vace is not None:
        what = f"a {base.part}" if base.part != TRANSFORMER else "a VACE model already"
        raise UserError(
            f"{base.source}: is {what}, and the VACE blocks of {file} need the plain model under "
            "them; give the T2V checkpoint with --with"
        )
    config = dataclasses.replace(base.config, vace=_config(module, base.config, base.source, file))
    shapes = shapes_of(TRANSFORMER, config)
    published: wan.Layout = "original" if base.layout == "original" else "diffusers"
    named: wan.Layout = "original" if layout == "original" else "diffusers"
    table = wan.rules(config, published)
    own = rules.stored(table) if base.layout == "store" else table
    theirs = {slot.name: slot.torch for slot in rules.expand(wan.rules(config, named), shapes)}
    ours = {slot.name: slot.torch for slot in rules.expand(own, shapes)}
    renamed = {theirs[name]: ours[name] for name in ours}
    added = {renamed.get(name, name): tensor for name, tensor in module.items()}
    if repeated := sorted(set(added) & set(base.tensors)):
        raise UserError(f"{file}: tensor {repeated[0]} is also in {base.source}; give one of them")
    network = dataclasses.replace(
        base,
        config=config,
        values=FAMILIES[TRANSFORMER].table.config_to_json(config),
        table=table,
        shapes=shapes,
        tensors={**base.tensors, **added},
        source=file,
        original=None,
        notices=(*base.notices, f"its VACE blocks are laid over {base.source.name}"),
    )
    network.matched()
    return network


def _config(
    module: Mapping[str, FileTensor], base: WanConfig, source: Path, file: Path
) -> VaceConfig:
    """Infer the layers with hints, which are evenly spaced in every published size."""
    shape = module[EMBEDDING].shape if EMBEDDING in module else ()
    if len(shape) != 5:
        raise UserError(f"{file}: tensor {EMBEDDING} is missing or of another shape")
    if shape[0] != base.width:
        raise UserError(
            f"{file}: its VACE blocks are made for width {shape[0]}, the model of {source} has "
            f"{base.width}; give the T2V model of the same size"
        )
    found = (re.match(r"vace_blocks\.(\d+)\.", name) for name in module)
    hints = 1 + max(int(match[1]) for match in found if match)
    if base.num_layers % hints:
        raise UserError(
            f"{file}: its {hints} VACE blocks do not spread over the {base.num_layers} layers of "
            f"{source}; give the T2V model of the same size"
        )
    layers = range(0, base.num_layers, base.num_layers // hints)
    return VaceConfig(tuple(layers), int(shape[1]))
