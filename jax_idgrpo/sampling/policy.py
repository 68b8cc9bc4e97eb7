"""The policy's velocity: a frozen transformer, an adapter that may be off, and guidance with all its branches in one batch.

Rollout and replay both call `Policy.velocity`; nothing else turns latents into velocities, so the two cannot disagree.

    VACE      v = v_negative + guidance (v_prompt - v_negative), the same control in both
    Phantom   v = v_none + image_guidance (v_photos - v_none) + guidance (v_both - v_photos)

v_both sees prompt and photos, v_photos the negative prompt and the photos, v_none the negative prompt and zeros in the photos' place.
Source: Phantom-video/Phantom, `subject2video.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import PromptCache, WanTransformer, unstack_blocks
from jax_idgrpo.sampling.conditioning import Conditioning


@dataclasses.dataclass(frozen=True)
class Policy:
    """Structure of the transformer with and without its adapter; the arrays are passed in.

    adapted, plain: the two graph definitions. guidance: scale of the prompt. image_guidance: scale of the photos, None for a model without
    such a branch (VACE). With all scales 1 the branch of prompt and photos runs alone.
    """

    adapted: Any
    plain: Any
    guidance: float
    image_guidance: float | None = None

    @property
    def branches(self) -> int:
        """Passes of the transformer per velocity."""
        if self.guidance == 1 and self.image_guidance in (None, 1):
            return 1
        return 2 if self.image_guidance is None else 3

    def unguided(self) -> "Policy":
        """The branch of prompt and photos alone."""
        return dataclasses.replace(
            self, guidance=1.0, image_guidance=None if self.image_guidance is None else 1.0
        )

    # Both programs below stand between barriers, so that they are compiled to the same products wherever they are called. What has no
    # gradient stands in a barrier of its own: one that has a gradient makes one for everything in it, the frozen weights' for nobody.

    def prefill(
        self,
        lora: nnx.State | None,
        base: nnx.State,
        conditioning: Conditioning,
        negative: Float[Array, "L D"],
    ) -> PromptCache:
        """What a velocity needs of the prompts alone, for all noise levels; `lora=None` is the frozen base.

        negative: [L,D] the encoded negative prompt, shared by all rows; unused without guidance.
        """
        text, control = conditioning.text, conditioning.control
        lora = jax.lax.optimization_barrier(lora)
        base, text, control, negative = jax.lax.optimization_barrier(
            (base, text, control, negative)
        )
        others = [jnp.broadcast_to(negative, text.shape)] * (self.branches - 1)
        cache = self._network(lora, base).prefill(_together([text, *others]), control)
        main, vace = jax.lax.optimization_barrier((cache.main, cache.vace))
        return PromptCache(main, vace, jax.lax.optimization_barrier(cache.control))

    def velocity(
        self,
        lora: nnx.State | None,
        base: nnx.State,
        x: Float[Array, "B N H W C"],
        timestep: Int[Array, "..."],
        conditioning: Conditioning,
        negative: Float[Array, "L D"],
        cache: PromptCache | None = None,
    ) -> Float[Array, "B N H W C"]:
        """The guided velocity [B,N,H,W,16], float32, at one integer timestep or one per row; `lora=None` is the frozen base.

        prompt: what `prefill` says for the same adapter, conditioning and negative prompt; worked out here where it is not given.
        """
        cache = self.prefill(lora, base, conditioning, negative) if cache is None else cache
        timestep = jnp.broadcast_to(timestep, x.shape[:1])
        lora, x, main, vace = jax.lax.optimization_barrier((lora, x, cache.main, cache.vace))
        base, timestep, conditioning, control = jax.lax.optimization_barrier(
            (base, timestep, conditioning, cache.control)
        )
        frames = x.shape[1]

        def repeat(array: Array) -> Array:
            return _together([array] * self.branches)

        latents, mask = repeat(x), repeat(conditioning.frame_mask)
        if conditioning.reference_latents is None:
            control = repeat(control)
        else:
            references = [conditioning.reference_latents] * min(self.branches, 2) + [
                jnp.zeros_like(conditioning.reference_latents)
            ] * (self.branches - 2)
            latents = jnp.concatenate([latents, _together(references)], axis=1)
            mask = jnp.concatenate([mask, repeat(conditioning.reference_mask)], axis=1)
        found = self._network(lora, base).velocity(
            latents, repeat(timestep), PromptCache(main, vace, control), frame_mask=mask
        )[:, :frames]
        return jax.lax.optimization_barrier(self._combine(found))

    def _network(self, lora: nnx.State | None, base: nnx.State) -> WanTransformer:
        return nnx.merge(self.plain, base) if lora is None else nnx.merge(self.adapted, base, lora)

    def _combine(self, branches: Float[Array, "R N H W C"]) -> Float[Array, "B N H W C"]:
        """The velocities of the branches, those of a row together, as one."""
        if self.branches == 1:
            return branches
        parts = branches.reshape(-1, self.branches, *branches.shape[1:])
        if self.image_guidance is None:
            prompt, none = parts[:, 0], parts[:, 1]
            return none + self.guidance * (prompt - none)
        both, photos, none = parts[:, 0], parts[:, 1], parts[:, 2]
        return none + self.image_guidance * (photos - none) + self.guidance * (both - photos)


def _together(branches: Sequence[Array]) -> Array:
    """One batch [branches B, ...] of all branches, those of a row together: where rows are divided over devices, each stays on its own."""
    return jnp.stack(branches, axis=1).reshape(-1, *branches[0].shape[1:])


def split(
    transformer: WanTransformer, guidance: float, image_guidance: float | None = None
) -> tuple[Policy, nnx.State, nnx.State]:
    """A transformer with adapters -> (policy, adapter state, base state)."""
    adapted, lora, base = nnx.split(transformer, LoRAParam, ...)
    config = dataclasses.replace(transformer.config, rank=0)
    plain = nnx.split(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(0)))
    )[0]
    if config.unroll and config.mesh is None:
        base = unstack_blocks(base)
    return (
        Policy(adapted=adapted, plain=plain, guidance=guidance, image_guidance=image_guidance),
        lora,
        base,
    )
