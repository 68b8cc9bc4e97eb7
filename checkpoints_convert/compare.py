"""Compare two checkpoints tensor by tensor and bit for bit, whatever their layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from checkpoints_convert import lora
from checkpoints_convert.identify import ADAPTER
from checkpoints_convert.lazy import Tensor, iter_chunks
from checkpoints_convert.network import Network, ours


def differences(left: Mapping[str, Network], right: Mapping[str, Network]) -> Iterator[str]:
    """Yield a sentence per config, and per tensor whose presence, shape, dtype or bits differ.

    Tensors are named as in the files. If the names differ, the name in the second file follows.
    """
    sides = (left, right)
    for part in sorted(set(left) | set(right)):
        if not all(part in side for side in sides):
            yield f"{part} is only in {(left if part in left else right)[part].source}"
            continue
        configs = [side[part].config for side in sides]
        if part == ADAPTER:
            yield from _different_scales(*configs)
        elif configs[0] != configs[1]:
            yield f"{part}: the configs describe different networks"
        a, b = (ours(side[part]) for side in sides)
        names = [_file_names(side[part]) for side in sides]
        for name in sorted(set(a) | set(b)):
            spelled = list(dict.fromkeys(found[name] for found in names if name in found))
            shown = spelled[0] if len(spelled) == 1 else f"{spelled[0]} (second: {spelled[1]})"
            if name not in a or name not in b:
                yield f"{part}: {shown} is only in {(left if name in a else right)[part].source}"
            elif a[name].shape != b[name].shape:
                shapes = [_file_shape(side[part], name) for side in sides]
                yield f"{part}: {shown} has shapes {shapes[0]} and {shapes[1]}"
            elif a[name].dtype != b[name].dtype:
                yield f"{part}: {shown} has dtypes {a[name].dtype} and {b[name].dtype}"
            elif count := _different(a[name], b[name]):
                total = np.prod(a[name].shape, dtype=int)
                yield f"{part}: {shown} differs in {count} of {total} values"


def _different_scales(left: lora.Scales, right: lora.Scales) -> Iterator[str]:
    """Yield a sentence for the first layer of both adapters that has another rank or alpha."""
    differing = [layer for layer in left if layer in right and left[layer] != right[layer]]
    for layer in differing[:1]:
        more = f" (and of {len(differing) - 1} further layers)" if len(differing) > 1 else ""
        yield (
            "adapter: rank and alpha are ({}, {:g}) and ({}, {:g})".format(
                *left[layer], *right[layer]
            )
            + f" of {layer.name}{more}"
        )


def _file_names(network: Network) -> dict[str, str]:
    """Map our name of every tensor to its name in the file."""
    return {slot.name: tensor.name for slot, tensor in network.matched()}


def _file_shape(network: Network, name: str) -> list[int]:
    """Return the shape in the file of the tensor with our name."""
    return next(list(tensor.shape) for slot, tensor in network.matched() if slot.name == name)


def _different(a: Tensor, b: Tensor) -> int:
    """Count the values of two tensors of equal shape and dtype that differ in their bits."""
    bits = np.dtype(f"u{np.dtype(a.dtype).itemsize}")
    pairs = zip(iter_chunks(a), iter_chunks(b), strict=True)
    return sum(int(np.count_nonzero(one.view(bits) != other.view(bits))) for one, other in pairs)
