"""Describe which linear layers of the transformer have LoRA, with rank and alpha of each.

The blocks of a stack are one module with stacked leaves, so the leaves of a layer have the largest
rank R of its blocks. A block of smaller rank has zeros in the other columns of A and rows of B.
Both gradients are zero there, so the zeros remain: each block keeps its own rank.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class LayerLoRA:
    """LoRA of one linear layer, or of that layer in every block of a stack.

    Attributes:
      name: dotted path of the layer without the number of the block, such as "blocks.attn1.to_q".
      ranks: rank in each block, 0 for none; one number for a layer outside the stacks.
      alphas: alpha in each block; block i is scaled by alphas[i] / ranks[i].
    """

    name: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def rank(self) -> int:
        """R, the rank of the leaves."""
        return max(self.ranks)

    @property
    def uniform(self) -> bool:
        """Whether all blocks have the same rank and alpha."""
        return len(set(zip(self.ranks, self.alphas, strict=True))) == 1

    @property
    def alpha(self) -> float:
        """Alpha of the layer; R, so that its scale is 1, if `scales` are applied to B instead."""
        return self.alphas[0] if self.uniform else float(self.rank)

    @property
    def scales(self) -> Float[np.ndarray, "blocks 1 1"]:
        """The factor alpha / rank of B in each block, if the blocks differ."""
        scales = [alpha / max(rank, 1) for rank, alpha in zip(self.ranks, self.alphas, strict=True)]
        return np.asarray(scales, np.float32)[:, None, None]

    @property
    def initial(self) -> Float[np.ndarray, "blocks 1 R"]:
        """The factor of a new A ~ N(0, 1/R^2) in each block: R / rank, 0 beyond the rank."""
        ranks = np.asarray(self.ranks)[:, None, None]
        inside = np.arange(self.rank)[None, None, :] < ranks
        return (inside * self.rank / np.maximum(ranks, 1)).astype(np.float32)
