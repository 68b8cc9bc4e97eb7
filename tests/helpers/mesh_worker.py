"""Run by test_parallel.py in a process of its own: one rollout, decode, reward and gradient on each mesh given, stored as arrays.

python -m tests.helpers.mesh_worker OUT '{"data": 2, "seq": 4}' ...

With "weights", patterns as in model.train_layers, these weights are trained in place of an adapter, and an optimizer step is taken.
With {"experts": 2} beside the axes, the model has two, and the window reaches both. With "weakened", as in rollout.weakened,
there is a weakened branch.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_idgrpo import rng
from jax_idgrpo.config import GrpoConfig, MeshConfig
from jax_idgrpo.config.weakened import weak_branch
from jax_idgrpo.models import vae
from jax_idgrpo.models.experts import together
from jax_idgrpo.models.layers import FLOAT32
from jax_idgrpo.models.wan import VaceConfig, WanConfig, WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.conditioning import Conditioning, frame_mask
from jax_idgrpo.sampling.weights import select_weights
from jax_idgrpo.training import update
from jax_idgrpo.training.state import start

ROWS, STEPS, FRAMES, PEOPLE = 4, 3, 3, 2
SIZES = dict(
    num_layers=4,
    num_heads=6,
    head_dim=8,
    ffn_dim=40,
    text_dim=16,
    freq_dim=16,
    vace=VaceConfig((0, 2)),
    rank=2,
    alpha=2.0,
    remat="full",
)


def random(state: nnx.State, seed: int = 1) -> nnx.State:
    """The state with every leaf random, also those that start at zero."""
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


def run(
    mesh: jax.sharding.Mesh,
    patterns: str | None = None,
    experts: int = 1,
    weakened: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    random_numbers = np.random.default_rng(2)
    references = jnp.asarray([1, 2, 2, 1])
    condition = Conditioning(
        text=jnp.asarray(random_numbers.normal(size=(ROWS, 5, 16)), jnp.float32),
        control=jnp.asarray(
            random_numbers.normal(size=(ROWS, FRAMES + PEOPLE, 4, 6, 96)), jnp.float32
        ),
        frame_mask=frame_mask(references, FRAMES, PEOPLE),
        references=references,
    )
    negative = jnp.asarray(random_numbers.normal(size=(5, 16)), jnp.float32)
    sizes = SIZES if patterns is None else SIZES | {"rank": 0}
    transformers = []
    for seed in range(1, experts + 1):
        config = WanConfig(**sizes, mesh=mesh)
        transformers.append(WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)))
        nnx.update(transformers[-1], random(nnx.state(transformers[-1]), seed))
    weights = None if patterns is None else select_weights(transformers[0], patterns)
    actor, lora, base = policy.split_experts(transformers, [3.0] * experts, weights=weights)
    if (branch := weak_branch("weakened", weakened or {})) is not None:
        actor = actor.weakened(policy.Weakening.make(branch, STEPS, 3.0))
    optimizer = together([optax.adam(1e-3, eps=1e-4)] * experts)
    state = sharding.shard_params(mesh, start(optimizer, lora))
    base = sharding.shard_params(mesh, base)
    vae_config = vae.VAEConfig(
        base_dim=4,
        dim_mult=(1, 1, 1, 1),
        num_res_blocks=1,
        temporal_downsample=(False, True, True),
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )
    graph, decoder = nnx.split(vae.WanVAE(vae_config, rngs=nnx.Rngs(0)))

    def on_mesh(tree):
        return jax.device_put(tree, sharding.batch_sharding(mesh))

    schedule = rollout.Schedule.make(STEPS, 3.0, boundary=0.9 if experts == 2 else None)
    noise = rng.row_keys(rng.key(0, "noise"), jnp.asarray([7, 7, 9, 9]), jnp.asarray([0, 1, 0, 1]))
    window = rollout.Window(start=jnp.zeros(ROWS, jnp.int32), size=STEPS - 1, final_noise=False)
    condition, noise, window = on_mesh((condition, noise, window))
    trajectory = rollout.sample_experts(
        actor,
        policy.PolicyInputs(state.params, base, condition, negative),
        schedule,
        noise,
        noise,
        window,
    )
    whole = sharding.device_put_global(random(decoder), sharding.replicated(mesh))
    decoded = (graph, whole), trajectory.latents, condition.references, FRAMES
    video = rollout.decode(*decoded)
    exchanges = re.findall(
        r" (all-[\w-]+|collective-\w+|reduce-scatter)(?:-start)?\(",
        rollout.decode.lower(*decoded).compile().as_text(),
    )
    rewards = np.asarray(jnp.mean(jnp.sin(3 * video), axis=(1, 2, 3, 4)))

    advantage = (rewards - rewards.mean())[None] / rewards.std()
    chunk = update.Rollout(
        trajectory=trajectory, conditioning=condition, start=window.start, noise=noise
    )
    batch = update.store(None, chunk, jnp.int32(0), 1)
    batch = dataclasses.replace(batch, advantage=advantage, weight=np.ones_like(advantage))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, 1))
    objective = update.UpdateRule(
        policy=actor, grpo=GrpoConfig(kl=0.1), optimizer=optimizer, ema_decay=0.9
    )
    reference = None
    if weights is not None:
        reference = jax.tree.map(lambda leaf: 0.9 * leaf, actor.snapshot(state.params))
    networks = update.Networks(base=base, negative=negative, reference=reference)
    gradient, rows = jax.jit(update.gradients, static_argnums=0, static_argnames="trained")(
        objective,
        state.params,
        networks,
        batch,
        schedule,
        jnp.int32(0),
        trained=tuple(range(experts)),
    )
    step = {}
    if weights is not None:
        largest = max(
            leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves((state, gradient))
        )
        before = flat(state.params)
        moved, _ = update.update(objective, state, networks, batch, schedule, jnp.int32(0))
        after = flat(moved.params), flat(moved.ema), flat(moved.optimizer)
        places = sharding.state_shardings(mesh, moved)
        step = {
            "step": np.concatenate([after[0] - before, after[1] - before, after[2]]),
            "in_place": np.asarray(
                [
                    leaf.sharding.is_equivalent_to(place, leaf.ndim)
                    for leaf, place in zip(*map(jax.tree.leaves, (moved, places)), strict=True)
                ]
            ),
            "largest": np.asarray(largest),
        }
    return step | {
        "start": np.asarray(rollout._start(noise, condition)),
        "latents": np.asarray(trajectory.latents),
        "log_prob": np.asarray(trajectory.log_prob),
        "rewards": rewards,
        "exchanges": np.asarray(exchanges),
        "ratio": np.asarray(rows["ratio"]),
        "loss": np.asarray(rows["policy_loss"] + 0.1 * rows["kl"]),
        "gradient": flat(gradient),
    }


def flat(tree: Any) -> np.ndarray:
    """Return all numbers of a tree in the order of its paths."""
    leaves = {
        sharding.leaf_name(path): np.asarray(leaf).ravel()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return np.concatenate([leaves[name] for name in sorted(leaves)])


def main(out: str, *meshes: str) -> None:
    vae.ATTENTION_LOGITS = 1  # as of a large video: its frames attend one after the other
    for number, text in enumerate(meshes):
        sizes = {"data": 1} | json.loads(text)
        patterns, experts = sizes.pop("weights", None), sizes.pop("experts", 1)
        weakened = sizes.pop("weakened", None)
        count = int(np.prod(list(sizes.values())))
        mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
        np.savez(Path(out) / f"{number}.npz", **run(mesh, patterns, experts, weakened))


if __name__ == "__main__":
    main(*sys.argv[1:])
