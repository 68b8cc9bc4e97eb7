"""Read sums of adapters (`checkpoints_convert.lora_add`), and merge them into a transformer."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_convert import adapter, lora_add
from checkpoints_convert.experts import expert_places
from checkpoints_convert.lora_add import Parts
from checkpoints_convert.lora_names import Layer
from checkpoints_convert.places import LoRASum
from jax_idgrpo.config import ModelConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import product
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.parallel import sharding


def read_adapter(path: Path | LoRASum, config: WanConfig) -> Parts:
    """Read an adapter or a sum of adapters.

    Args:
      path: its place.
      config: of the transformer that it is for.

    Returns:
      Rank and alpha of every layer, and A and B in torch's layout by our names.

    Raises:
      UserError: an adapter cannot be read or is made for another transformer, or its values are not
        finite.
    """
    if isinstance(path, LoRASum):
        return lora_add.added([(read_adapter(part, config), scale) for part, scale in path.parts])
    found = adapter.open_adapter(path)
    if (problem := adapter.misfit(found, config)) is not None:
        raise UserError(f"{found.source}: {problem}; pass an adapter of this model")
    return lora_add.read_parts(path)


def base_loras(model: ModelConfig) -> LoRASum | None:
    """Return the adapters of `model.base_loras`; None if there are none."""
    parts = tuple((Path(path), float(scale)) for path, scale in model.base_loras.items())
    return LoRASum(parts) if parts else None


def merge_base(transformers: Sequence[WanTransformer], model: ModelConfig) -> None:
    """Add `model.base_loras` to the kernels of a model, in float32, in their dtype.

    Args:
      transformers: one, or the experts for high and low noise.
      model: names the adapters.

    Raises:
      UserError: as in `read_adapter`.
    """
    if (parts := base_loras(model)) is None:
        return
    places = expert_places(parts, len(transformers))
    for transformer, place in zip(transformers, places, strict=True):
        _merge(transformer, place)


def _merge(transformer: WanTransformer, parts: Path | LoRASum) -> None:
    """Add adapters to the kernels of a transformer."""
    scales, matrices = read_adapter(parts, transformer.config)
    by_leaf: dict[str, dict[int, Layer]] = {}
    for layer in scales:
        by_leaf.setdefault(layer.leaf, {})[layer.block or 0] = layer
    for leaf, blocks in by_leaf.items():
        linear = functools.reduce(getattr, leaf.split("."), transformer)
        stacked = transformer.config.depth(leaf) > 0
        kernel = linear.kernel[...]
        there = sharding.fetched(kernel)
        whole = there if stacked else there[None]
        rank = max(scales[layer].rank for layer in blocks.values())
        a = np.zeros((len(whole), whole.shape[1], rank), np.float32)
        b = np.zeros((len(whole), rank, whole.shape[2]), np.float32)
        for block, layer in blocks.items():
            own = scales[layer].rank
            a[block, :, :own] = np.asarray(matrices[f"{layer.name}.lora_a"]).T
            b[block, :own] = np.asarray(matrices[f"{layer.name}.lora_b"]).T
        mesh = transformer.config.mesh
        if mesh is not None:
            a, b = sharding.device_put_global((a, b), sharding.replicated(mesh))
        moved = _moved(whole, a, b)
        moved = moved if stacked else moved[0]
        linear.kernel[...] = jax.device_put(moved, kernel.sharding)


@jax.jit
def _moved(
    kernel: Float[Array, "*blocks in out"],
    a: Float[Array, "*blocks in R"],
    b: Float[Array, "*blocks R out"],
) -> Float[Array, "*blocks in out"]:
    """Return W + A B of every block."""

    def one(part: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = part
        return (kernel.astype(jnp.float32) + product(a, b)).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, a, b))
