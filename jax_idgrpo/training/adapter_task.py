"""Train a video model on stored clips: flow matching, or DPO on stored pairs.

    x_sigma = (1 - sigma) x0 + sigma noise,    target = noise - x0
    flow    = sum of w |v(x_sigma, t, text, photos) - target|^2 / sum of w,    mean over rows
    dpo     = `grpo.dpo_loss` of winner and loser, over the frames of the video

x0 is laid out as in sampling (`sampling.conditioning`). VACE denoises the photos' slots too; they
have the weight `SLOT_WEIGHT`, because the control contains the clean photos. The velocity is
`Policy.velocity`, the function that sampling and reinforcement learning call. Every row has its own
noise, and its padding is masked, so the loss of a row does not depend on the other rows.

What is trained is an adapter, or the weights that `model.train_layers` selects.

For flow, sigma = shift u / (1 + (shift - 1) u) with u spread evenly over the batch. For DPO, both
rows of a pair share noise and sigma, which follow `grpo.levels`. The reference is the velocity
without the adapter, or with the weights before training.

Sources: ID-Animator (arXiv 2404.15275) for random references; MagicID (arXiv 2503.12689) for pairs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jax_idgrpo import flow, grpo, rng
from jax_idgrpo.config import Config
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.rewards.base import ReferenceFaces
from jax_idgrpo.sampling import conditioning, policy
from jax_idgrpo.sampling.policy import Policy, PolicyInputs
from jax_idgrpo.sampling.rollout import Schedule
from jax_idgrpo.sampling.weights import TrainedWeights
from jax_idgrpo.training.identity_loss import IdentityLoss, decoded_rows
from jax_idgrpo.training.task import Loss, StopRule
from jax_idgrpo.training.update import noise_level

SLOT_WEIGHT = 0.25
"""Loss weight of VACE's photo slots; that of the video's cells is 1 outside faces."""

WORSE = 0.1  # relative rise of the winners' error over the base's that counts as worse
WORSE_STEPS = 20  # worse steps in a row that end a run
WINNERS_WORSE = StopRule(
    lambda row: row["winner_error"] > (1 + WORSE) * row["winner_error_base"],
    WORSE_STEPS,
    f"the error of the winners was more than {WORSE:.0%} above the base's, so the model unlearns the "
    "better videos too; the checkpoint of this step is kept; start again in another --workdir with "
    "a lower --optimizer.learning_rate or a higher --grpo.dpo_beta",
)
"""Ends DPO that raises the errors of both videos of a pair."""


@flax.struct.dataclass
class ClipBatch:
    """B rows of encoded clips with their photos and texts, float32.

    Attributes:
      video: latents of the clips.
      photos: latents of the photos in the order of their slots, zero in the padding.
      people: number of photos; 0 in a row of VACE that is trained on text alone.
      text: text embeddings, zero after the end.
      weight: loss weight of the video's cells.
      faces: the people's encoded references; None without an identity loss.
      layout: latents of VACE's control video: drawn boxes of people, or mid-grey in rows without;
        None if no row of the run has boxes.
    """

    video: Float[Array, "B T h w C"]
    photos: Float[Array, "B M h w C"]
    people: Int[Array, " B"]
    text: Float[Array, "B L D"]
    weight: Float[Array, "B T h w"]
    faces: ReferenceFaces | None = None
    layout: Float[Array, "B T h w C"] | None = None


@flax.struct.dataclass
class Fixed:
    """Arrays that a loss reads besides network and batch, and that no step changes.

    Attributes:
      reference: trained weights before training, with which DPO compares; None for an adapter,
        whose base is the network without it, and for flow matching.
      scorer: the VAE, and the state of the reward's networks; None without an identity loss.
    """

    reference: nnx.State | None = None
    scorer: Any = None


NOTHING = Fixed()


@dataclasses.dataclass(frozen=True)
class Learner:
    """Static part of the losses.

    Attributes:
      policy: structure of the transformer with and without its adapter, without guidance.
      config: of the run.
      shift: shift of the noise schedule.
      grey: latents of a mid-grey video; unused by kinds without control.
      identity: the identity loss of flow matching; None without one.
      mesh: devices of the rows.
    """

    policy: Policy
    config: Config
    shift: float
    grey: Float[np.ndarray, "T h w C"]
    identity: IdentityLoss | None = None
    mesh: Mesh | None = None

    @classmethod
    def make(
        cls,
        transformer: WanTransformer,
        config: Config,
        shift: float,
        grey: np.ndarray,
        weights: TrainedWeights | None = None,
        identity: IdentityLoss | None = None,
    ) -> "Learner":
        """Make the learner of a transformer.

        Args:
          transformer: arrays or shapes; with an adapter, unless weights are trained.
          config: of the run.
          shift: of the schedule.
          grey: see the attributes.
          weights: the trained weights; None trains the adapter.
          identity: see the attributes.
        """
        image_guidance = None if config.kind.image_guidance is None else 1.0
        if weights is not None:
            graph = nnx.graphdef(transformer)
            whole = Policy(graph, graph, 1.0, image_guidance, weights)
            return cls(whole, config, shift, grey, identity, transformer.config.mesh)
        adapted, _, _ = nnx.split(transformer, LoRAParam, ...)
        shape = dataclasses.replace(transformer.config, rank=0)
        plain = nnx.graphdef(
            nnx.eval_shape(
                lambda: WanTransformer(shape, dtypes=transformer.dtypes, rngs=nnx.Rngs(0))
            )
        )
        return cls(
            Policy(adapted, plain, 1.0, image_guidance),
            config,
            shift,
            grey,
            identity,
            transformer.config.mesh,
        )

    def parts(self, network: WanTransformer) -> tuple[nnx.State, nnx.State]:
        """Split a network into trained parameters and frozen weights."""
        if self.policy.weights is not None:
            return self.policy.weights.split(nnx.state(network))
        _, lora, base = nnx.split(network, LoRAParam, ...)
        return lora, base

    # ---- rows ------------------------------------------------------------------------------------

    def inputs(
        self, batch: ClipBatch
    ) -> tuple[Float[Array, "B N h w C"], Float[Array, "B N h w"], conditioning.Conditioning]:
        """Lay out the rows of a batch as the model's kind does.

        Returns:
          x0 of what is denoised, the loss weight of its cells, and the conditioning.
        """
        kind, rows = self.config.kind, len(batch.video)
        frames, slots = batch.video.shape[1], batch.photos.shape[1]
        if self.config.model.kind != "vace":
            given = conditioning.Conditioning(
                text=batch.text,
                control=None,
                frame_mask=jnp.ones((rows, frames), bool),
                references=batch.people,
                reference_latents=batch.photos,
                padding_attended=kind.slots > 0,
                photos_read_text=kind.photos_read_text,
            )
            return batch.video, batch.weight, given
        grey = jnp.broadcast_to(jnp.asarray(self.grey, jnp.float32), batch.video.shape)
        ones = jnp.ones((*grey.shape[:-1], conditioning.MASK_CHANNELS), jnp.float32)
        layout = grey if batch.layout is None else batch.layout
        of_video = jnp.concatenate([grey, layout, ones], axis=-1)
        missing = of_video.shape[-1] - batch.photos.shape[-1]
        of_photos = jnp.pad(batch.photos, ((0, 0),) * 4 + ((0, missing),))
        slot_weight = jnp.full((*batch.photos.shape[:-1],), SLOT_WEIGHT)
        x0, control, weight = (
            _arranged(front, middle, batch.people)
            for front, middle in (
                (batch.photos, batch.video),
                (of_photos, of_video),
                (slot_weight, batch.weight),
            )
        )
        mask = conditioning.frame_mask(batch.people, frames, slots)
        given = conditioning.Conditioning(
            text=batch.text, control=control, frame_mask=mask, references=batch.people
        )
        return x0, weight, given

    def _velocity(
        self,
        lora: nnx.State | None,
        base: nnx.State,
        given: conditioning.Conditioning,
        x: Array,
        timestep: Array,
    ) -> Array:
        # Without guidance there is no negative branch.
        inputs = PolicyInputs(lora, base, given, given.text[0])
        return self.policy.velocity(inputs, x, timestep)

    # ---- losses ----------------------------------------------------------------------------------

    def flow_rows(
        self,
        lora: nnx.State | None,
        base: nnx.State,
        batch: ClipBatch,
        key: Key[Array, ""],
        scorer: Any = None,
    ) -> dict[str, Float[Array, " B"]]:
        """Compute the flow-matching loss of every row, and its unweighted error on the video.

        Args:
          lora: the adapter or the trained weights; None for the base without an adapter.
          base: frozen weights.
          batch: the rows.
          key: key of noise and sigma.
          scorer: VAE and reward, which adds the identity loss of every row; None leaves it out.
        """
        x0, weight, given = self.inputs(batch)
        rows = len(x0)
        u = (jnp.arange(rows) + jax.random.uniform(rng.fold(key, rows), (rows,))) / rows
        sigma = flow.shifted(u, self.shift)
        noise = rng.step_noise(
            jax.vmap(lambda row: rng.fold(key, row))(jnp.arange(rows)), 0, x0.shape[1:]
        )
        along = sigma[:, None, None, None, None]
        x = (1 - along) * x0 + along * noise
        velocity = self._velocity(lora, base, given, x, flow.timestep(sigma))
        error = jnp.mean((velocity - (noise - x0)) ** 2, axis=-1)
        frames = batch.video.shape[1]
        of_video = conditioning.video_latents(error[..., None], given.video_start, frames)
        cells = tuple(range(1, error.ndim))
        found = {
            "loss": jnp.sum(weight * error, axis=cells) / jnp.sum(weight, axis=cells),
            "video_error": jnp.mean(of_video, axis=(1, 2, 3, 4)),
        }
        if scorer is None or self.identity is None:
            return found
        shown = jnp.any(batch.photos != 0, axis=(1, 2, 3, 4)).astype(jnp.float32)
        return found | self.identity.rows(
            scorer,
            x - along * velocity,
            x0,
            sigma,
            shown,
            (given, batch.faces),
            decoded_rows(rows, self.shift, self.mesh),
            self.mesh,
        )

    def flow_loss(
        self,
        network: WanTransformer,
        batch: ClipBatch,
        key: Key[Array, ""],
        fixed: Fixed = NOTHING,
    ) -> Loss:
        """Compute the mean flow-matching loss of a batch, with the identity loss if there is one.

        `identity_loss` is a mean over all rows, and `identity_rows` the share of the rows that have
        one.

        Args:
          network: the transformer.
          batch: the rows.
          key: key of noise and sigma.
          fixed: the scorer of the identity loss.
        """
        rows = self.flow_rows(*self.parts(network), batch, key, fixed.scorer)
        means = {name: jnp.mean(values) for name, values in rows.items()}
        loss = means.pop("loss")
        if self.identity is not None:
            loss += self.identity.weight * means["identity_loss"]
        return loss, means

    def dpo_loss(
        self,
        network: WanTransformer,
        batch: ClipBatch,
        key: Key[Array, ""],
        fixed: Fixed = NOTHING,
    ) -> Loss:
        """Compute the mean DPO loss of pairs: rows 0, 2, ... are preferred to rows 1, 3, ...

        The errors of winners and of losers are logged apart, with those of the base: DPO can raise
        both.

        Args:
          network: the transformer.
          batch: the rows.
          key: key of noise and sigma.
          fixed: the reference, if weights are trained.
        """
        lora, base = self.parts(network)
        x0, _, given = self.inputs(batch)
        pairs, settings = len(x0) // 2, self.config.grpo
        keys = jax.vmap(lambda pair: rng.fold(key, pair))(jnp.arange(pairs))
        u = (jnp.arange(pairs) + rng.step_uniform(keys, 0)) / pairs
        noise = jnp.repeat(rng.step_noise(keys, 0, x0.shape[1:]), 2, axis=0)
        schedule = Schedule.make(self.config.rollout.steps, self.shift)
        sigma, timestep = noise_level(settings.levels, jnp.repeat(u, 2), schedule)
        along = sigma[:, None, None, None, None]
        x, target = (1 - along) * x0 + along * noise, noise - x0
        velocity = self._velocity(lora, base, given, x, timestep)
        reference = jax.lax.stop_gradient(self._velocity(fixed.reference, base, given, x, timestep))
        place = jnp.arange(x0.shape[1]) - given.video_start[:, None]
        mask = (place >= 0) & (place < batch.video.shape[1])
        loss = grpo.dpo_loss(velocity, reference, target, beta=settings.dpo_beta, mask=mask)
        own, theirs = (grpo.matching_error(v, target, mask) for v in (velocity, reference))
        change = own - theirs
        return jnp.mean(loss), {
            "winner_error": jnp.mean(own[0::2]),
            "loser_error": jnp.mean(own[1::2]),
            "winner_error_base": jnp.mean(theirs[0::2]),
            "loser_error_base": jnp.mean(theirs[1::2]),
            "pair_accuracy": jnp.mean((change[0::2] < change[1::2]).astype(jnp.float32)),
        }


def _arranged(
    front: Float[Array, "B M *shape"], middle: Float[Array, "B T *shape"], count: Int[Array, " B"]
) -> Float[Array, "B M+T *shape"]:
    """Put the first `count` frames of `front` before `middle`, and zeros after it, per row.

    Args:
      front: M frames.
      middle: T frames.
      count: used frames of `front`, per row.
    """
    slots, frames = front.shape[1], middle.shape[1]

    def row(front: Array, middle: Array, count: Array) -> Array:
        place = jnp.arange(slots + frames)
        source = jnp.where(place < count, place, jnp.clip(place - count, 0, frames - 1) + slots)
        taken = jnp.concatenate([front, middle])[source]
        used = (place < count + frames).reshape(-1, *(1,) * (taken.ndim - 1))
        return jnp.where(used, taken, 0.0)

    return jax.vmap(row)(front, middle, count)


def make_held_out(
    learner: Callable[[], Learner], batches: Callable[[], Sequence[ClipBatch]], seed: int
) -> Callable[[nnx.Module, Callable[[Any], Any]], dict[str, float]]:
    """Make the function that measures the loss of held-out clips, and that of the base.

    The base of an adapter is the network without it. If weights are trained, it is the network of
    the first call. Every call uses the same noise, so the values of different steps are comparable.

    Args:
      learner: returns the learner.
      batches: returns the held-out batches.
      seed: seed of the noise.
    """

    @functools.cache
    def program() -> Callable[..., Float[Array, " B"]]:
        made = learner()
        return jax.jit(lambda *given: made.flow_rows(*given)["loss"])

    def rows_of(lora: nnx.State | None, base: nnx.State, place: Callable[[Any], Any]) -> float:
        key = rng.key(seed, "evaluate")
        found = [
            program()(lora, base, place(batch), rng.fold(key, number))
            for number, batch in enumerate(batches())
        ]
        return float(np.mean([jax.device_get(jnp.mean(loss)) for loss in found]))

    known: dict[str, float] = {}

    def evaluate(network: nnx.Module, place: Callable[[Any], Any]) -> dict[str, float]:
        made = learner()
        lora, base = made.parts(network)
        if "held_out_loss_base" not in known:
            before = None if made.policy.weights is None else lora
            known["held_out_loss_base"] = rows_of(before, base, place)
        return {"held_out_loss": rows_of(lora, base, place), **known}

    return evaluate


def sampling_policy(
    network: WanTransformer, config: Config, weights: TrainedWeights | None = None
) -> tuple[policy.Policy, nnx.State, nnx.State]:
    """Split a network for sampling with the guidance of the evaluation.

    Args:
      network: the transformer.
      config: of the run.
      weights: the trained weights; None for an adapter.
    """
    return policy.split(
        network,
        config.guidance(evaluation=True)[0],
        config.image_guidance(evaluation=True),
        weights,
    )
