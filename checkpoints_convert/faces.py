"""Rule tables of the face networks.

ArcFace: the names of deepface's PyTorch `arcface_weights.pth`, in which our small embedder is stored too. The counters
`num_batches_tracked` of a PyTorch file carry no value; drop them (`without_counters`) before matching.
Networks of our own keep our names (`plain`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_convert.rules import CONV2D, TRANSPOSE, VECTOR, Op, Rule, leaves
from jax_idgrpo.models.arcface import ArcFaceConfig


@dataclasses.dataclass(frozen=True)
class FlattenedDense(Op):
    """torch Linear [E, C h w] after a channels-first flatten -> kernel [h w C, E] after a channels-last one."""

    channels: int = 0

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        size, inputs = tensor.shape
        return tensor.reshape(size, self.channels, inputs // self.channels).transpose(2, 1, 0).reshape(inputs, size)

    def invert(self, array: np.ndarray) -> np.ndarray:
        inputs, size = array.shape
        return array.reshape(inputs // self.channels, self.channels, size).transpose(2, 1, 0).reshape(size, inputs)


def _batch_norm(torch: str, jax: str) -> list[Rule]:
    pairs = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
    return [Rule(f"{torch}.{theirs}", f"{jax}.{ours}", VECTOR) for theirs, ours in pairs]


def _conv(torch: str, jax: str) -> Rule:
    return Rule(f"{torch}.weight", f"{jax}.kernel", CONV2D)


def arcface(config: ArcFaceConfig) -> list[Rule]:
    """deepface's names of an ArcFace network with convolution shortcuts and an affine last norm."""
    rules = [_conv("backbone.conv1_conv", "conv"), *_batch_norm("backbone.conv1_bn", "norm")]
    rules += [Rule("backbone.conv1_prelu.weight", "prelu.slope", VECTOR)]
    for stage, units in enumerate(config.units):
        for k in range(units):
            torch, jax = f"backbone.conv{stage + 2}.{k}", f"stages.{stage}.{k}"
            if k == 0:
                rules += [_conv(f"{torch}.conv_0", f"{jax}.shortcut.conv"), *_batch_norm(f"{torch}.bn_0", f"{jax}.shortcut.norm")]
            for part in (1, 2):
                rules += [_conv(f"{torch}.conv_{part}", f"{jax}.conv{part}")]
            for part in (1, 2, 3):
                rules += _batch_norm(f"{torch}.bn_{part}", f"{jax}.norm{part}")
            rules += [Rule(f"{torch}.prelu_1.weight", f"{jax}.prelu.slope", VECTOR)]
    flattened = FlattenedDense(TRANSPOSE.permutation, TRANSPOSE.groups, TRANSPOSE.sizes, channels=config.widths[-1])
    dense = [Rule("dense.weight", "dense.kernel", flattened), Rule("dense.bias", "dense.bias", VECTOR)]
    return [*rules, *_batch_norm("bn", "tail_norm"), *dense, *_batch_norm("embedding", "embedding_norm")]


def plain(state: Any) -> list[Rule]:
    """Our own names and layouts, for networks that no other library knows: one rule per leaf of `state`."""
    sizes = {path: len(leaf.shape) for path, leaf in leaves(state).items()}
    return [Rule(path, path, Op(tuple(range(axes)), (1,) * axes, (None,) * axes)) for path, axes in sizes.items()]


def without_counters(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without the batch counters of PyTorch's batch norms."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
