"""The policy's velocity: a frozen transformer, an adapter that may be off, and classifier-free guidance in one batch.

Rollout and replay both call `Policy.velocity`; nothing else turns latents into velocities, so the two cannot disagree.
For VACE, v = v_negative + guidance (v_prompt - v_negative), with the same control in both branches.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_idgrpo.conditioning import Conditioning
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import WanTransformer


@dataclasses.dataclass(frozen=True)
class Policy:
    """Structure of the transformer with and without its adapter; the arrays are passed in.

    adapted, plain: the two graph definitions. guidance: scale s of the guidance; 1 runs the prompt's branch alone.
    """

    adapted: Any
    plain: Any
    guidance: float

    def velocity(
        self,
        lora: nnx.State | None,
        base: nnx.State,
        x: Float[Array, "B N H W C"],
        timestep: Int[Array, "..."],
        conditioning: Conditioning,
        negative: Float[Array, "L D"],
    ) -> Float[Array, "B N H W C"]:
        """The guided velocity [B,N,H,W,16], float32, at one integer timestep or one per row; `lora=None` is the frozen base.

        negative: [L,D] the encoded negative prompt, shared by all rows; unused when guidance is 1.
        """
        timestep = jnp.broadcast_to(timestep, x.shape[:1])
        lora, base, x, timestep, conditioning, negative = jax.lax.optimization_barrier((lora, base, x, timestep, conditioning, negative))
        model = nnx.merge(self.plain, base) if lora is None else nnx.merge(self.adapted, base, lora)
        if self.guidance == 1:
            return jax.lax.optimization_barrier(
                model(x, timestep, conditioning.text, conditioning.control, frame_mask=conditioning.frame_mask)
            )
        both = model(
            _twice(x),
            _twice(timestep),
            jnp.concatenate([conditioning.text, jnp.broadcast_to(negative, conditioning.text.shape)]),
            _twice(conditioning.control),
            frame_mask=_twice(conditioning.frame_mask),
        )
        guided, unguided = jnp.split(both, 2)
        return jax.lax.optimization_barrier(unguided + self.guidance * (guided - unguided))


def _twice(array: Array) -> Array:
    return jnp.concatenate([array, array])


def split(transformer: WanTransformer, guidance: float) -> tuple[Policy, nnx.State, nnx.State]:
    """A transformer with adapters -> (policy, adapter state, base state)."""
    adapted, lora, base = nnx.split(transformer, LoRAParam, ...)
    config = dataclasses.replace(transformer.config, rank=0)
    plain = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(0))))[0]
    return Policy(adapted=adapted, plain=plain, guidance=guidance), lora, base
