"""The autoencoder: reference arrays, chunks, causality, refusals; and the task that trains the small one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs.embedded_vae import get_config
from jax_idgrpo import rng
from jax_idgrpo.synthetic.training import vae as task_vae
from jax_idgrpo.training.task import make_task
from tests.helpers.vae import COMPILER, TINY, tiny_vae

# ---- the task ------------------------------------------------------------------------------------------------------------


def small_task(**changes):
    config = get_config()
    options = config.finetune.options | dict(
        base_dim=2, dim_mult=[1, 2, 2, 2], clips_from=1, pictures=[2, 1], frames=5, crop=32
    )
    options |= dict(pictures_beside_clips=[1, 1]) | changes
    finetune = dataclasses.replace(config.finetune, batch=1, options=options)
    return make_task(dataclasses.replace(config, finetune=finetune))


def test_batches_are_pictures_then_clips_too_and_repeat():
    task = small_task()
    (pictures,) = task.batch(5, 0)
    clips, more = task.batch(5, 1)
    assert pictures.video.shape == (3, 1, 32, 32, 3)
    assert clips.video.shape == (1, 5, 32, 32, 3)
    assert more.video.shape == (2, 1, 32, 32, 3)
    np.testing.assert_array_equal(task.batch(5, 1)[0].video, clips.video)
    assert not np.array_equal(task.batch(5, 2)[0].video, clips.video)
    assert set(np.unique(clips.weight)) <= {1.0, 3.0}


def test_a_new_network_is_blind_to_earlier_frames_and_learns():
    task = small_task()
    network = task.init(rng.key(0, "init"))
    (pictures,) = task.batch(5, 0)
    graph, state = nnx.split(network)

    @functools.partial(jax.jit, compiler_options=COMPILER)
    @jax.value_and_grad
    def loss(state):
        return task.loss(nnx.merge(graph, state), (pictures,), rng.key(0, "augment"))[0]

    value, gradients = loss(state)
    kernel = gradients["decoder"]["conv_in"]["kernel"][...]
    assert not kernel[:2].any()
    assert kernel[2].any()
    assert not state["decoder"]["conv_in"]["kernel"][...][:2].any()
    stepped = jax.tree.map(
        lambda p, g: p - 1e-3 * g / optax.global_norm(gradients), state, gradients
    )
    assert loss(stepped)[0] < value


def test_the_decoder_alone_leaves_the_encoder():
    task = small_task(train="decoder", pictures_beside_clips=[0, 0])
    graph, state = tiny_vae()
    (clips,) = task.batch(5, 1)
    value = lambda state: task.loss(nnx.merge(graph, state), (clips,), rng.key(0, "augment"))[0]  # noqa: E731
    gradients = jax.jit(jax.grad(value), compiler_options=COMPILER)(state)
    assert optax.global_norm(gradients["encoder"]) == 0
    assert optax.global_norm(gradients["decoder"]) > 0


def test_saved_statistics_normalise_the_latents():
    graph, state = tiny_vae()
    network = task_vae.with_statistics(nnx.merge(graph, state), seed=1, frames=1, size=(64, 64))
    assert network.config.latents_mean != TINY.latents_mean
    groups = [
        task_vae._draw_pictures(rng.key(seed, "data"), 32, 32, task_vae.View("train"))
        for seed in range(2)
    ]
    latents = network.encode(jnp.concatenate([group.video for group in groups])).reshape(-1, 16)
    assert np.abs(latents.mean(axis=0)).max() < 0.2
    assert np.abs(latents.std(axis=0) - 1).max() < 0.2
