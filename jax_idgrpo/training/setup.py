"""Parts of a training run: the pipeline, the rollout of an objective, and its cost."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import conditioning, policy, rollout
from jax_idgrpo.sampling.pipeline import Pipeline, load_pipeline


def score_latents(
    function: Callable[..., dict[str, Array]],
    max_people: int,
    scorer: tuple[Any, nnx.State],
    latents: Float[Array, "B N h w C"],
    condition: conditioning.Conditioning,
    people: Any,
) -> Float[Array, "B"]:
    """The reward of final latents as a function of arrays: `scorer` holds the VAE and the state of the reward's networks,
    `people` the encoded references."""
    vae, state = scorer
    video = rollout.decode(vae, latents, condition.video_start, condition.video_frames(max_people))
    return function(state, video, people)["reward"]


Given = tuple[policy.Policy, nnx.State, nnx.State, conditioning.Conditioning, Float[Array, "L D"]]
"""What a velocity depends on beside its latents: policy, adapter, base, conditioning, negative prompt."""


def sample(
    config: Config,
    given: Given,
    schedule: rollout.Schedule,
    start_keys: Key[Array, "B"],
    noise_keys: Key[Array, "B"],
    window: rollout.Window,
) -> rollout.Trajectory:
    """What the objective trains on, of one chunk: trained steps, or where reward gradients begin, or final latents alone."""
    if config.grpo.replays:
        return rollout.sample(*given, schedule, start_keys, noise_keys, window)
    if config.grpo.objective == "reward_gradient":
        before = config.rollout.steps - config.grpo.gradient_steps
        x = rollout.generate(*given, schedule.part(0, before), start_keys)
        latents = rollout.denoise(*given, schedule.part(before, config.rollout.steps), x)
        return rollout.Trajectory(latents=latents, x=x[:, None])
    return rollout.Trajectory(latents=rollout.generate(*given, schedule, start_keys))


def forward_passes(config: Config, branches: int) -> dict[str, float]:
    """Transformer passes of one training step by phase, each of one video at one noise level: a measure of cost that no machine changes.

    branches: passes per guided velocity. update: every velocity that an update evaluates, those of the frozen base and of the old
    policy among them. backward: those of them that a gradient runs back through.
    """
    sampling, wanted = config.rollout, config.grpo
    if wanted.objective == "reward_gradient":
        levels, trained = wanted.gradient_steps, branches
    elif wanted.replays:
        levels, trained = sampling.trained_steps, branches
    else:
        levels, trained = wanted.times, 1
    base = wanted.kl > 0 or wanted.objective == "dpo"
    old = not (wanted.replays or wanted.on_policy)
    backward = config.trained_rows * wanted.epochs * levels * trained
    return {
        "forward_passes_rollout": float(sampling.rows * sampling.steps * branches),
        "forward_passes_update": float(backward * (1 + base + old)),
        "backward_passes": float(backward),
    }


def load(config: Config, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline of `config.model` on a mesh, with a fresh adapter or the one it names."""
    model = config.model
    pipe = load_pipeline(
        model.folder(), model.dtype, model.kind, model.rank, model.alpha,
        seed=config.run.seed, remat=model.remat, unroll=model.unroll, mesh=mesh, text_memory=model.text_memory,
    )
    if model.adapter:
        pipe.load_lora(model.adapter)
        found = pipe.transformer.config
        if (found.rank, found.alpha) != (model.rank, model.alpha):
            raise UserError(
                f"model.adapter {model.adapter}: rank {found.rank}, alpha {found.alpha:g}; set --model.rank and --model.alpha to these"
            )
    return pipe
