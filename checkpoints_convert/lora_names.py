"""Name the linear layers of the Wan transformer, which may have LoRA, in all layouts.

A layer is named by our dotted path with the number of its block, such as `blocks.3.attn1.to_q`.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from checkpoints_convert import wan
from jax_idgrpo.models.wan import PATCH, STACKS, WanConfig

OURS, DIFFUSERS, ORIGINAL = range(3)  # columns of `ROWS`

# Our name, diffusers' and the original repository's; `{i}` is the number of the block.
ROWS: tuple[tuple[str, str, str], ...] = (
    *(
        (f"{stack}.{{i}}.{row[0]}", f"{stack}.{{i}}.{row[1]}", f"{stack}.{{i}}.{row[2]}")
        for stack in STACKS
        for row in (
            *wan.ATTENTION,
            *wan.FEED_FORWARD,
            *((wan.VACE_OUT,) if stack == "vace_blocks" else ()),
        )
    ),
    wan.VACE_IN,
    *wan.TOP_LINEAR,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer.

    Attributes:
      row: its names, one of `ROWS`.
      block: number of its block; None outside the stacks.
    """

    row: tuple[str, str, str]
    block: int | None = None

    def spelled(self, column: int) -> str:
        """Return the name in a column of `ROWS`."""
        return self.row[column].replace("{i}", str(self.block))

    @property
    def name(self) -> str:
        """Our name."""
        return self.spelled(OURS)

    @property
    def leaf(self) -> str:
        """Path of the layer in our network, without the number of the block."""
        return self.row[OURS].replace("{i}.", "")


def layers(config: WanConfig) -> list[Layer]:
    """List the linear layers of a transformer."""
    found = []
    for row in ROWS:
        stack = row[OURS].split(".")[0]
        if "{i}" in row[OURS]:
            found += [Layer(row, block) for block in range(config.depth(stack))]
        elif config.vace is not None or row != wan.VACE_IN:
            found.append(Layer(row))
    return found


@functools.cache
def _flat() -> dict[str, tuple[str, str, str]]:
    """Map every spelling of a row, with `_` for `.`, to the row."""
    return {
        row[column].replace("{i}", "0").replace(".", "_"): row
        for row in ROWS
        for column in (OURS, DIFFUSERS, ORIGINAL)
    }


def find(name: str) -> Layer | None:
    """Find a layer by its name in any layout, with `.` or `_` between the parts; None if unknown.

    No two names are equal when their dots are replaced by `_`.
    """
    flat = name.replace(".", "_")
    if (row := _flat().get(flat)) is not None and "{i}" not in row[OURS]:
        return Layer(row)
    match = re.fullmatch(r"((?:vace_)?blocks_)(0|[1-9]\d*)(_.+)", flat)
    row = _flat().get(f"{match[1]}0{match[3]}") if match else None
    return (
        None
        if match is None or row is None or "{i}" not in row[OURS]
        else Layer(row, int(match[2]))
    )


def shape(layer: Layer, config: WanConfig) -> tuple[int, int]:
    """Return (in, out) of a layer of a transformer."""
    width, special = (
        config.width,
        {
            "ffn.linear_1": (config.width, config.ffn_dim),
            "ffn.linear_2": (config.ffn_dim, config.width),
            "condition_embedder.time_embedder.linear_1": (config.freq_dim, config.width),
            "condition_embedder.time_proj": (config.width, 6 * config.width),
            "condition_embedder.text_embedder.linear_1": (config.text_dim, config.width),
            "proj_out": (config.width, PATCH * PATCH * config.out_channels),
        },
    )
    name = layer.leaf if layer.block is None else layer.leaf.partition(".")[2]
    if layer.block is not None and name == "proj_out":
        return width, width
    return special.get(name, (width, width))
