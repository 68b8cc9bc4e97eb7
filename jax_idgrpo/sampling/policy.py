"""Compute the policy's velocity: transformer, optional LoRA, and guidance in one batch.

Rollout and replay both call `Policy.velocity`, and no other function maps latents to velocities.

    VACE     v = v_negative + guidance (v_prompt - v_negative), the same control in both
    others   v = v_none + image_guidance (v_photos - v_none) + guidance (v_both - v_photos)

v_both is conditioned on the prompt and the photos, v_photos on the negative prompt and the photos,
v_none on the negative prompt and zeros in place of the photos. A weakened branch (`Weakening`) is
subtracted from these, or takes the place of the last of them.
Sources: those of `config.model_kinds`.

A model with two experts has one policy for each; `Policy.of` and `PolicyInputs.of` select one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo import flow
from jax_idgrpo.config import Config, EvaluateConfig, RolloutConfig
from jax_idgrpo.config.weakened import WeakBranch, weak_branch
from jax_idgrpo.errors import UserError
from jax_idgrpo.models import experts
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import PromptCache, Skipped, WanTransformer, unstack_blocks
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.weights import TrainedWeights

Parameters: TypeAlias = nnx.State | experts.Pair[nnx.State]
"""Trained parameters or frozen weights of the transformer, or of both experts."""


@struct.dataclass
class PolicyInputs:
    """Arrays that a velocity depends on besides its latents and timestep.

    Attributes:
      lora: trained parameters: an adapter, for which None is the frozen base, or trained weights.
      base: frozen weights, which may be in host memory if there are two experts.
      conditioning: of the B rows.
      negative: encoded negative prompt, shared by all rows; unused without guidance.
    """

    lora: nnx.State | experts.Pair[nnx.State] | None
    base: nnx.State | experts.Pair[nnx.State]
    conditioning: Conditioning
    negative: Float[Array, "L D"]

    def of(self, expert: int) -> "PolicyInputs":
        """Return the inputs of one expert, with its base on the devices."""
        return dataclasses.replace(
            self,
            lora=None if self.lora is None else experts.each(self.lora)[expert],
            base=sharding.fetched(experts.each(self.base)[expert]),
        )


@dataclasses.dataclass(frozen=True)
class Weakening:
    """A branch that sees less than the others (`config.weakened.WeakBranch`).

    For VACE, "none" moves the photos' slots of the branch behind its video and masks them, so that
    it is text to video: rotary positions of the video start at 0. Its velocity on the slots is that
    of the guided branches. For the other kinds, zeros take the place of the photos. Skipped blocks
    are computed and dropped, which keeps one program for all rows.
    Sources: TPIGE (arXiv 2509.01362), spatio-temporal guidance (arXiv 2411.18664).

    Attributes:
      branch: the settings.
      timesteps: smallest and largest timestep on which it acts.
    """

    branch: WeakBranch
    timesteps: tuple[int, int]

    @classmethod
    def make(cls, branch: WeakBranch, steps: int, shift: float) -> "Weakening":
        """Find the timesteps of a schedule.

        Args:
          branch: the settings.
          steps: denoising steps.
          shift: of the flow.

        Raises:
          UserError: no step of the schedule is in `branch.steps`.
        """
        first, last = branch.steps
        timesteps = flow.timesteps(steps, shift)
        acts = timesteps[[first <= index / steps < last for index in range(steps)]]
        if not len(acts):
            raise UserError(
                f"weakened: none of the {steps} denoising steps is in {list(branch.steps)}; widen "
                "its steps"
            )
        return cls(branch, (int(acts[-1]), int(acts[0])))

    @property
    def separate(self) -> bool:
        """Whether this is a branch of its own, and not the negative one."""
        return self.branch.source != "negative"

    def acts(self, timestep: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Return the rows on whose timestep it acts."""
        low, high = self.timesteps
        return (timestep >= low) & (timestep <= high)

    def control(self, conditioning: Conditioning) -> Float[Array, "B frames H W 96"]:
        """Return VACE's control as the branch sees it."""
        control = jnp.asarray(conditioning.control)
        if self.branch.photos == "none":
            return _rolled(control, -jnp.asarray(conditioning.references))
        slots = jnp.arange(control.shape[1]) < jnp.asarray(conditioning.references)[:, None]
        return jnp.where(slots[..., None, None, None], 0.0, control)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Structure of the transformer with and without its adapter; the arrays are arguments.

    If the weights themselves are trained, both are the transformer.

    If all scales are 1, only the branch of prompt and photos runs.

    Attributes:
      adapted: graph definition with the adapter.
      plain: graph definition without it.
      guidance: scale of the prompt.
      image_guidance: scale of the photos; None for a model without that branch (VACE).
      weights: the trained weights; None if an adapter is trained.
      low_noise: policy of the low-noise expert, if there are two; the other fields are then of the
        high-noise expert.
      weakening: the weakened branch; None without one.
      control_scale: strength of VACE's hints.
    """

    adapted: Any
    plain: Any
    guidance: float
    image_guidance: float | None = None
    weights: TrainedWeights | None = None
    low_noise: "Policy | None" = None
    weakening: Weakening | None = None
    control_scale: float = 1.0

    @property
    def experts(self) -> "tuple[Policy, ...]":
        """Policies of the experts, each of one transformer."""
        own = dataclasses.replace(self, low_noise=None)
        return (own,) if self.low_noise is None else (own, self.low_noise)

    def of(self, expert: int) -> "Policy":
        """Return the policy of one expert."""
        return self.experts[expert]

    @property
    def branches(self) -> int:
        """Passes of the transformer per velocity."""
        return self._guided + (self._separate is not None)

    @property
    def _guided(self) -> int:
        """Number of branches without a weakened one of its own."""
        if self.guidance == 1 and self.image_guidance in (None, 1):
            return 1
        return 2 if self.image_guidance is None else 3

    @property
    def _separate(self) -> Weakening | None:
        """The weakened branch, if it is one of its own."""
        weak = self.weakening
        return weak if weak is not None and weak.separate else None

    def unguided(self) -> "Policy":
        """Return the policy without guidance: only the branch of prompt and photos runs."""
        plain = self.with_guidance((1.0, 1.0), None if self.image_guidance is None else 1.0)
        return plain.weakened(None, self.control_scale)

    def configured(self, config: Config, shift: float, evaluation: bool = False) -> "Policy":
        """Return the policy with the scales and the weakened branch of a configuration.

        Args:
          config: the configuration.
          shift: of the checkpoint's flow, if the configuration has none.
          evaluation: whether to take those of the evaluation.

        Raises:
          UserError: no step is weakened.
        """
        own: RolloutConfig | EvaluateConfig = config.evaluate if evaluation else config.rollout
        name = f"{own.section}.weakened"
        branch, weakening = weak_branch(name, own.weakened), None
        if branch is not None:
            weakening = Weakening.make(branch, own.steps, config.rollout.shift or shift)
        scaled = self.with_guidance(config.guidance(evaluation), config.image_guidance(evaluation))
        return scaled.weakened(weakening, own.control_scale)

    def weakened(self, weakening: Weakening | None, control_scale: float = 1.0) -> "Policy":
        """Return the policy with another weakened branch and another strength of VACE's hints."""
        return _chained(
            [
                dataclasses.replace(policy, weakening=weakening, control_scale=control_scale)
                for policy in self.experts
            ]
        )

    def with_guidance(self, guidance: Sequence[float], image_guidance: float | None) -> "Policy":
        """Return the policy with other scales.

        Args:
          guidance: scale of the prompt, per expert.
          image_guidance: scale of the photos; None for a model without that branch.
        """
        return _chained(
            [
                dataclasses.replace(policy, guidance=scale, image_guidance=image_guidance)
                for policy, scale in zip(self.experts, guidance, strict=False)
            ]
        )

    # Optimization barriers isolate both functions so XLA compiles them identically in rollout and
    # replay. Inputs without gradients get their own barrier: a shared one would materialise
    # gradients for the frozen weights.

    def prefill(self, inputs: PolicyInputs) -> PromptCache:
        """Compute the part of a velocity that depends only on the prompts, for all noise levels."""
        text, control = inputs.conditioning.text, inputs.conditioning.control
        lora = jax.lax.optimization_barrier(inputs.lora)
        base, text, control, negative = jax.lax.optimization_barrier(
            (inputs.base, text, control, inputs.negative)
        )
        texts = [text, *[jnp.broadcast_to(negative, text.shape)] * (self._guided - 1)]
        if (weak := self._separate) is not None:
            texts.append(text)
            if control is not None and weak.branch.photos != "kept":
                control = _together([control, weak.control(inputs.conditioning)])
        cache = self._network(lora, base).prefill(_together(texts), control)
        main, vace = jax.lax.optimization_barrier((cache.main, cache.vace))
        return PromptCache(main, vace, jax.lax.optimization_barrier(cache.control))

    def velocity(
        self,
        inputs: PolicyInputs,
        x: Float[Array, "B frames H W C"],
        timestep: Int[Array, "..."],
        cache: PromptCache | None = None,
    ) -> Float[Array, "B frames H W C"]:
        """Compute the guided velocity, float32.

        Args:
          inputs: adapter, weights and prompts.
          x: latents that are denoised: the video, for VACE with references and padding.
          timestep: integers 0 .. 999, one for all rows or one per row.
          cache: result of `prefill` for the same inputs; None computes it.
        """
        cache = self.prefill(inputs) if cache is None else cache
        timestep = jnp.broadcast_to(timestep, x.shape[:1])
        lora, x, main, vace = jax.lax.optimization_barrier((inputs.lora, x, cache.main, cache.vace))
        base, timestep, conditioning = jax.lax.optimization_barrier(
            (inputs.base, timestep, inputs.conditioning)
        )
        control = jax.lax.optimization_barrier(cache.control)  # LoRA may be before it
        frames, weak = x.shape[1], self._separate

        def repeat(array: Array, weakened: Array | None = None) -> Array:
            last = array if weakened is None else weakened
            return _together([array] * self._guided + [last] * (weak is not None))

        latents, mask = repeat(x), repeat(conditioning.frame_mask)
        if conditioning.reference_latents is None:
            if weak is not None and weak.branch.photos != "kept":
                control = repeat(*jnp.moveaxis(control.reshape(-1, 2, *control.shape[1:]), 1, 0))
                if weak.branch.photos == "none":
                    slots = jnp.asarray(conditioning.references)
                    shown = jnp.sum(conditioning.frame_mask, axis=1) - slots
                    latents = repeat(x, _rolled(x, -slots))
                    mask = repeat(
                        conditioning.frame_mask, jnp.arange(frames)[None] < shown[:, None]
                    )
            else:
                control = repeat(control)
        else:
            photos = conditioning.reference_latents
            blank = jnp.zeros_like(photos)
            references = [photos] * min(self._guided, 2) + [blank] * (self._guided - 2)
            if weak is not None:
                references.append(photos if weak.branch.photos == "kept" else blank)
            latents = jnp.concatenate([latents, _together(references)], axis=1)
            mask = (
                None
                if conditioning.padding_attended
                else jnp.concatenate([mask, repeat(conditioning.reference_mask)], axis=1)
            )
        branches = self._network(lora, base).velocity(
            latents,
            repeat(timestep),
            PromptCache(main, vace, control),
            frame_mask=mask,
            control_scale=self.control_scale,
            text_frames=None if conditioning.photos_read_text else frames,
            skipped=self._skipped(timestep),
        )[:, :frames]
        return jax.lax.optimization_barrier(self._combine(branches, timestep, conditioning))

    def _skipped(self, timestep: Int[Array, " B"]) -> Skipped | None:
        """Return the blocks that the rows of the last branch skip."""
        if self.weakening is None or not self.weakening.branch.blocks:
            return None
        last = jnp.arange(self.branches) == self.branches - 1
        rows = (self.weakening.acts(timestep)[:, None] & last).reshape(-1)
        return Skipped(self.weakening.branch.blocks, rows)

    def snapshot(self, params: Parameters) -> Parameters:
        """Copy trained parameters in the dtypes in which the network uses them."""
        stored = params if self.weights is None else self.weights.stored(params)
        return jax.tree.map(jnp.copy, stored)

    def shard_gradient(self, gradient: nnx.State) -> nnx.State:
        """Shard the gradient of trained weights as the weights; an adapter's is small."""
        return gradient if self.weights is None else self.weights.shard(gradient)

    def _network(self, lora: nnx.State | None, base: nnx.State) -> WanTransformer:
        if lora is None:
            return nnx.merge(self.plain, base)
        if self.weights is None:
            return nnx.merge(self.adapted, base, lora)
        return nnx.merge(self.adapted, self.weights.merge(lora, base))

    def _combine(
        self,
        branches: Float[Array, "rows frames H W C"],
        timestep: Int[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B frames H W C"]:
        """Combine the velocities of the branches by the scales.

        Args:
          branches: the velocities, in the order of `_together`.
          timestep: of the rows.
          conditioning: of the rows.
        """
        if self.branches == 1:
            return branches
        parts = branches.reshape(-1, self.branches, *branches.shape[1:])
        guided = self._combine_guided(parts)
        if (weak := self._separate) is None:
            return guided
        strong = guided if weak.branch.source == "guided" else parts[:, 0]
        difference = strong - parts[:, -1]
        if weak.branch.photos == "none" and conditioning.reference_latents is None:
            slots = jnp.asarray(conditioning.references)
            difference = strong - _rolled(parts[:, -1], slots)
            video = jnp.arange(difference.shape[1]) >= slots[:, None]
            difference = jnp.where(video[..., None, None, None], difference, 0.0)
        acts = weak.acts(timestep)[:, None, None, None, None]
        return guided + jnp.where(acts, weak.branch.scale * difference, 0.0)

    def _combine_guided(
        self, parts: Float[Array, "B branches frames H W C"]
    ) -> Float[Array, "B frames H W C"]:
        """Combine the velocities of prompt, photos and nothing."""
        if self._guided == 1:
            return parts[:, 0]
        if self.image_guidance is None:
            prompt, none = parts[:, 0], parts[:, 1]
            return none + self.guidance * (prompt - none)
        both, photos, none = parts[:, 0], parts[:, 1], parts[:, 2]
        return none + self.image_guidance * (photos - none) + self.guidance * (both - photos)


def _rolled(frames: Float[Array, "B frames *shape"], by: Int[Array, " B"]) -> Array:
    """Roll the frames of every row by its own number, on the circle."""
    return jax.vmap(lambda row, number: jnp.roll(row, number, axis=0))(frames, by)


def _together(branches: Sequence[Array]) -> Array:
    """Interleave the branches into one batch [B * branches, ...].

    The branches of a row are adjacent, so that sharding the batch keeps them on the row's device.
    """
    return jnp.stack(branches, axis=1).reshape(-1, *branches[0].shape[1:])


def split(
    transformer: WanTransformer,
    guidance: float,
    image_guidance: float | None = None,
    weights: TrainedWeights | None = None,
) -> tuple[Policy, nnx.State, nnx.State]:
    """Split a transformer into (policy, trained parameters, frozen weights).

    Args:
      transformer: transformer with adapters; without, if weights are trained.
      guidance: guidance scale of the prompt; 1 has no negative branch.
      image_guidance: guidance scale of the photos; None for a model without that branch.
      weights: the trained weights; None trains the adapter.
    """
    if weights is not None:
        graph, state = nnx.split(transformer)
        return Policy(graph, graph, guidance, image_guidance, weights), *weights.split(state)
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


def split_experts(
    transformers: Sequence[WanTransformer],
    guidance: Sequence[float],
    image_guidance: float | None = None,
    weights: TrainedWeights | None = None,
) -> tuple[Policy, nnx.State | experts.Pair[nnx.State], nnx.State | experts.Pair[nnx.State]]:
    """Split the transformers of a model into (policy, trained parameters, frozen weights).

    Args:
      transformers: one, or the experts for high and low noise, with adapters.
      guidance: guidance scale of the prompt, per expert; further ones are ignored.
      image_guidance: guidance scale of the photos; None for a model without that branch.
      weights: the trained weights of one transformer; None trains adapters.
    """
    parts = [
        split(transformer, scale, image_guidance, weights)
        for transformer, scale in zip(transformers, guidance, strict=False)
    ]
    policies, loras, bases = zip(*parts, strict=True)
    return _chained(policies), experts.together(loras), experts.together(bases)


def _chained(policies: Sequence[Policy]) -> Policy:
    """Join the policies of one or two experts; inverse of `Policy.experts`."""
    return (
        policies[0]
        if len(policies) == 1
        else dataclasses.replace(policies[0], low_noise=policies[1])
    )
