"""Describe an opened checkpoint in a line per network, and an adapter in one more."""

import collections
import math
from collections.abc import Collection

from checkpoints_convert import quantized
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.identify import FACE
from checkpoints_convert.lazy import size
from checkpoints_convert.network import Network
from jax_idgrpo.models.wan import PROJECTIONS, STACKS

SHOWN = 10  # differences that `verify` prints, extra names that `inspect` prints
SIZES = {  # tensors of the published transformers
    (1264, 2_153_972_032): "1.3B",
    (1331, 17_337_592_896): "14B",
    (825, 1_418_996_800): "1.3B",
    (1095, 14_288_491_584): "14B",
}


def describe(opened: Checkpoint) -> None:
    """Print a line per network: layout, counts, bytes and dtypes.

    Raises:
      UserError: the tensors do not fit the network.
    """
    for part, network in opened.networks.items():
        tensors = [quantized.stored(tensor) for tensor in network.tensors.values()]
        count = sum(math.prod(tensor.shape) for tensor in tensors)
        dtypes = collections.Counter(str(tensor.dtype) for tensor in tensors)
        kinds = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.most_common())
        name = (
            network.values.get("name") if network.part == FACE else SIZES.get((len(tensors), count))
        )
        print(
            f"{part}: {f'{name}, ' if name else ''}{network.layout} layout, "
            f"{len(tensors)} tensors, {count:,} parameters, {sum(map(size, tensors)):,} bytes, "
            f"{kinds} ({network.source})"
        )
        if network is opened.adapter:
            print(f"adapter: {describe_adapter(network)}")
        if network.extra:
            more = ", ..." if len(network.extra) > SHOWN else ""
            print(f"{part}: {len(network.extra)} extra: {', '.join(network.extra[:SHOWN])}{more}")
    for network in opened.networks.values():
        network.matched()


def describe_adapter(network: Network) -> str:
    """Describe ranks, alphas, width and layers of an adapter."""
    blocks: dict[str, set[int]] = {}
    for layer in network.config:
        stack = blocks.setdefault(
            layer.leaf.partition(".")[0] if layer.block is not None else "", set()
        )
        stack.add(layer.block or 0)
    widths = {
        slot.shape[0]
        for slot, _ in network.matched()
        if slot.name.endswith((".to_q.lora_a", ".to_k.lora_a", ".to_v.lora_a"))
    }
    scales = network.config.values()
    ranks, alphas = ({values[n] for values in scales} for n in (0, 1))
    parts = [
        f"rank {_range(ranks)}, alpha {_range(alphas)}",
        *([f"for width {_range(widths)}"] if widths else []),
    ]
    words = ", ".join(f"{len(blocks[stack])} {stack}" for stack in STACKS if stack in blocks)
    layers = {layer.leaf for layer in network.config}
    standard = {f"{stack}.{name}" for stack in blocks if stack for name in PROJECTIONS}
    if layers != standard:
        words += f"{', ' if words else ''}{len(network.config)} linear layers"
    return f"{', '.join(parts)}, {words}"


def _range(values: Collection[int | float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
