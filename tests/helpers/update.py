"""A tiny policy with rollouts, its gradients, and properties of the update that hold for each objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_idgrpo import flow, rng
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import VaceConfig, WanConfig, WanTransformer
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.conditioning import Conditioning, frame_mask
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.sampling.weights import select_weights
from jax_idgrpo.training import update
from tests.helpers.noise import add_noise

ROWS, STEPS, FRAMES, PEOPLE, LENGTH, WIDTH = 4, 3, 2, 2, 5, 16
CONFIG = WanConfig(
    num_layers=2,
    num_heads=2,
    head_dim=12,
    ffn_dim=32,
    text_dim=WIDTH,
    freq_dim=16,
    vace=VaceConfig((0,)),
    rank=2,
    alpha=2.0,
    unroll=True,
)
SCHEDULE = rollout.Schedule.make(STEPS, 3.0)


@functools.cache
def model(dtype="float32", guidance=3.0, remat="none"):
    """Return a policy whose adapter and zero-initialised layers are all random."""
    config = dataclasses.replace(CONFIG, remat=remat)
    transformer = WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    add_noise(transformer)
    return policy.split(transformer, guidance)


@functools.cache
def trained(patterns="", dtype="float32", guidance=3.0, remat="none"):
    """Return a policy whose weights are trained, the float32 weights, and the frozen ones."""
    config = dataclasses.replace(CONFIG, remat=remat, rank=0)
    transformer = WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    add_noise(transformer)
    weights = select_weights(transformer, patterns)
    actor, params, base = policy.split(transformer, guidance, weights=weights)
    return actor, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), base


@functools.cache
def asked():
    """Return the conditioning of four rows: one or two photos each."""
    rng = np.random.default_rng(2)
    references = jnp.asarray([1, 2, 2, 1])
    frames = FRAMES + PEOPLE
    return Conditioning(
        text=jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32),
        control=jnp.asarray(rng.normal(size=(ROWS, frames, 4, 6, 96)), jnp.float32),
        frame_mask=frame_mask(references, FRAMES, PEOPLE),
        references=references,
    )


NEGATIVE = jnp.asarray(np.random.default_rng(3).normal(size=(LENGTH, WIDTH)), jnp.float32)
NOISE = rng.row_keys(rng.key(0, "noise"), jnp.asarray([7, 7, 9, 9]), jnp.asarray([0, 1, 0, 1]))
ADVANTAGE = jnp.asarray([1.3, -0.7, 0.2, -0.9])
AGAIN = rng.row_keys(rng.key(0, "forward"), jnp.asarray([7, 7, 9, 9]), jnp.asarray([0, 1, 0, 1]))
FIRST = jnp.zeros(ROWS, jnp.int32)


def whole(start=FIRST, size=STEPS - 1, final_noise=False):
    """Return a window of the trained steps; by default all but the last."""
    return rollout.Window(start=start, size=size, final_noise=final_noise)


def sampled(parts, rows=slice(None), given=None, schedule=SCHEDULE, window=None):
    """One chunk of a rollout: trajectory, conditioning, window's start, keys."""
    actor, lora, base = parts
    given = given or jax.tree.map(lambda leaf: leaf[rows], asked())
    window = jax.tree.map(lambda leaf: leaf[rows], window or whole())
    trajectory = rollout.sample(
        actor,
        PolicyInputs(lora, base, given, NEGATIVE),
        schedule,
        NOISE[rows],
        NOISE[rows],
        window,
    )
    return update.Rollout(
        trajectory=trajectory, conditioning=given, start=window.start, noise=AGAIN[rows]
    )


def generated(parts, rows=slice(None)):
    """A chunk of a rollout of which only the final latents are kept."""
    actor, lora, base = parts
    given = jax.tree.map(lambda leaf: leaf[rows], asked())
    latents = rollout.generate(
        actor, PolicyInputs(lora, base, given, NEGATIVE), SCHEDULE, NOISE[rows]
    )
    return update.Rollout(
        trajectory=rollout.Trajectory(latents=latents),
        conditioning=given,
        start=FIRST[rows],
        noise=AGAIN[rows],
    )


def chunked(chunks, advantage, weight=None):
    """A rollout of chunks, stored as a training step stores them."""
    whole = None
    for number, chunk in enumerate(chunks):
        whole = update.store(whole, chunk, jnp.int32(number), len(chunks))
    weight = jnp.ones(ROWS) if weight is None else weight
    return dataclasses.replace(
        whole, advantage=advantage.reshape(len(chunks), -1), weight=weight.reshape(len(chunks), -1)
    )


def objective(actor, **changes):
    """Return an objective; `changes` are fields of the GRPO configuration."""
    return update.UpdateRule(
        policy=actor, grpo=GrpoConfig(**changes), optimizer=optax.sgd(1.0), ema_decay=0.9
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(fixed, lora, base, batch, schedule=SCHEDULE, old=None, step=0, reference=None):
    """Return the gradient of an update, and its numbers per step and row."""
    networks = update.Networks(base=base, negative=NEGATIVE, reference=reference, old=old)
    return update.gradients(fixed, lora, networks, batch, schedule, jnp.int32(step))


def vector(state):
    """Return all numbers of a state in one array."""
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state)])


OBJECTIVES = [
    dict(objective="clip"),
    dict(objective="clip", time_weights=True),
    dict(objective="nft", kl_units="velocity"),
    dict(objective="awm", kl_units="velocity", clip=0.5, levels="logit_normal"),
    dict(objective="dpo", kl_units="velocity", best=1, worst=1),
    dict(objective="sft", kl=0.0, best=1),
]


def named(wanted):
    """Return the name of an entry of OBJECTIVES."""
    return "-".join(map(str, wanted.values()))


def assert_micro_batches_equal_one_batch(wanted):
    """Rows are summed and divided by one count, also where one of them is left out."""
    actor, lora, base = model(guidance=1.0)
    fixed, make = (
        objective(actor, **wanted),
        sampled if wanted["objective"] == "clip" else generated,
    )
    weight = jnp.asarray([1.0, 1, 0, 0] if wanted["objective"] == "dpo" else [1.0, 1, 0, 1])
    one, _ = gradients(fixed, lora, base, chunked([make((actor, lora, base))], ADVANTAGE, weight))
    halves = [make((actor, lora, base), rows) for rows in (slice(0, 2), slice(2, 4))]
    parts, _ = gradients(fixed, lora, base, chunked(halves, ADVANTAGE, weight))
    assert np.linalg.norm(vector(parts) - vector(one)) < 1e-5 * np.linalg.norm(vector(one))


def assert_awm_is_on_policy(guidance, levels):
    """The first update's ratio is exactly 1, with the stored velocity and with that of the old adapter run again."""
    actor, lora, base = model(guidance=guidance)
    batch = chunked([generated((actor, lora, base))], ADVANTAGE)
    fixed = objective(
        actor, objective="awm", kl_units="velocity", clip=0.5, levels=levels, updates=2
    )
    for old in (None, lora):
        np.testing.assert_array_equal(
            gradients(fixed, lora, base, batch, old=old)[1]["ratio"], np.ones((1, 2, ROWS))
        )
    moved = jax.tree.map(lambda leaf: leaf * 1.1, lora)
    assert (
        float(jnp.abs(gradients(fixed, moved, base, batch, old=lora)[1]["ratio"] - 1).min()) > 1e-6
    )


def assert_descends_without_a_trajectory(wanted):
    """No trajectory is stored, a step along the gradient lowers the loss, and each optimizer step has noise of its own."""
    actor, lora, base = model(guidance=1.0)
    chunk = generated((actor, lora, base))
    assert chunk.trajectory.x is None
    assert chunk.trajectory.velocity is None
    batch = chunked([chunk], ADVANTAGE)
    fixed = objective(actor, **{**wanted, "kl": 0.0})
    gradient, rows = gradients(fixed, lora, base, batch, old=lora)
    size = 0.02 / optax.global_norm(gradient)
    stepped = jax.tree.map(lambda leaf, slope: leaf - size * slope, lora, gradient)
    _, after = gradients(fixed, stepped, base, batch, old=lora)
    assert float(after["policy_loss"].mean()) < float(rows["policy_loss"].mean())
    later, _ = gradients(fixed, lora, base, batch, old=lora, step=1)
    assert (
        np.abs(vector(later) - vector(gradient)).max() > 0
    )  # noise of its own at every optimizer step


def pull(scorer, latents, conditioning, people):
    """A reward with a known gradient: the mean of the latents times a constant."""
    return flow.row_mean(latents * scorer, conditioning.frame_mask) * people


def assert_reward_gradient_climbs(last):
    """The last steps are run again to the same latents, and a step along the gradient raises the reward by its norm."""
    actor, lora, base = model()
    weights = jnp.asarray(np.random.default_rng(7).normal(size=asked().latent_shape), jnp.float32)
    people = jnp.asarray([1.0, 2.0, 1.0, 0.5])
    given = (actor, PolicyInputs(lora, base, asked(), NEGATIVE))
    middle = rollout.generate(*given, SCHEDULE.part(0, STEPS - last), NOISE)
    latents = rollout.denoise(*given, SCHEDULE.part(STEPS - last, STEPS), middle)
    np.testing.assert_allclose(latents, rollout.generate(*given, SCHEDULE, NOISE), atol=1e-5)
    trajectory = rollout.Trajectory(latents=latents, x=middle[:, None])
    chunk = update.Rollout(
        trajectory=trajectory, conditioning=asked(), start=FIRST, noise=AGAIN, people=people
    )
    fixed = dataclasses.replace(
        objective(
            actor, objective="reward_gradient", kl_units="velocity", kl=0.0, gradient_steps=last
        ),
        score=pull,
    )

    @jax.jit
    def through(lora, chunk):
        networks = update.Networks(base=base, negative=NEGATIVE, scorer=weights)
        return update.gradients(
            fixed, lora, networks, chunked([chunk], ADVANTAGE), SCHEDULE, jnp.int32(0)
        )

    gradient, rows = through(lora, chunk)
    np.testing.assert_allclose(
        -rows["policy_loss"][0, 0], pull(weights, latents, asked(), people), rtol=1e-3, atol=1e-5
    )
    size = 0.01 / float(optax.global_norm(gradient))
    _, after = through(jax.tree.map(lambda leaf, slope: leaf - size * slope, lora, gradient), chunk)
    gained = float(rows["policy_loss"].mean() - after["policy_loss"].mean())
    np.testing.assert_allclose(gained, 0.01 * float(optax.global_norm(gradient)), rtol=0.1)


def distance_from_the_base(kl_weights, gradient_steps):
    """The distance of every row in the loss of `reward_gradient`, from the same latents."""
    actor, lora, base = model()
    given = (actor, PolicyInputs(lora, base, asked(), NEGATIVE))
    middle = rollout.generate(*given, SCHEDULE.part(0, STEPS - gradient_steps), NOISE)
    chunk = update.Rollout(
        trajectory=rollout.Trajectory(latents=middle, x=middle[:, None]),
        conditioning=asked(),
        start=FIRST,
        noise=AGAIN,
        people=jnp.ones(4),
    )
    wanted = dict(objective="reward_gradient", kl_units="velocity", kl=1.0)
    rule = objective(actor, **wanted, kl_weights=kl_weights, gradient_steps=gradient_steps)
    networks = update.Networks(base=base, negative=NEGATIVE, scorer=jnp.float32(1))
    inputs = update.LossInputs(networks, chunk, SCHEDULE, jnp.int32(0), jnp.int32(0))
    rows = update.rewarded_loss(dataclasses.replace(rule, score=pull), lora, inputs)
    return np.asarray(rows["kl"])
