"""The autoencoder against diffusers' AutoencoderKLWan, every weight random, on frames that all differ."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from checkpoints_convert import vae as table
from checkpoints_convert.rules import to_jax, to_torch
from jax_idgrpo.models.vae import WanVAE
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error

BOUND = 1e-5
COMPILER = {"xla_backend_optimization_level": 0}  # compiling is what takes the time here
SIZES = {
    "two blocks": dict(num_res_blocks=2),
    "one block": dict(num_res_blocks=1, dim_mult=[1, 2, 3, 5]),
}


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))


@cache
def pair(name):
    """A torch model, and the graph and state of ours with its weights."""
    theirs = torch_models.vae(seed=3, **SIZES[name])
    config = table.config_from_json(dict(theirs.config))
    graph, shapes = abstract(config)
    return theirs, graph, to_jax(table.rules(config), torch_models.tensors(theirs), shapes)


@cache
def program(graph, method):
    return jax.jit(
        lambda state, x: getattr(nnx.merge(graph, state), method)(x), compiler_options=COMPILER
    )


def moving_video(frames, rows=2):
    """[B,F,32,48,3] in [-1, 1]: a pattern that travels, and noise, so that no two frames are alike."""
    rng = np.random.default_rng(frames)
    x, y, t = (
        np.arange(48) / 48,
        np.arange(32)[:, None] / 32,
        np.arange(frames)[:, None, None, None],
    )
    phase = 2 * np.pi * rng.uniform(size=(rows, 1, 1, 1, 3))
    pattern = np.sin(6 * (x + y)[..., None] - 0.7 * t + phase)
    return np.clip(0.7 * pattern + 0.3 * rng.normal(size=(rows, frames, 32, 48, 3)), -1, 1).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("name", "frames"), [("two blocks", 1), ("two blocks", 17), ("one block", 5), ("one block", 9)]
)
def test_posterior_equals_diffusers(name, frames):
    theirs, graph, state = pair(name)
    video = moving_video(frames)
    mean, logvar = program(graph, "posterior")(state, video)
    want = theirs.encode(torch_models.channels_first(video)).latent_dist
    assert mean.shape == (2, (frames - 1) // 4 + 1, 4, 6, 16)
    assert relative_error(mean, torch_models.channels_last(want.mode())) < BOUND
    assert relative_error(logvar, torch_models.channels_last(want.logvar)) < BOUND


@pytest.mark.parametrize(
    ("name", "latents"), [("two blocks", 1), ("two blocks", 5), ("one block", 2), ("one block", 3)]
)
def test_decode_equals_diffusers_frame_by_frame(name, latents):
    theirs, graph, state = pair(name)
    mean, std = np.asarray(theirs.config.latents_mean), np.asarray(theirs.config.latents_std)
    z = np.random.default_rng(latents).normal(size=(2, latents, 4, 6, 16)).astype(np.float32)
    got = program(graph, "decode")(state, z)
    want = theirs.decode(torch_models.channels_first((z * std + mean).astype(np.float32))).sample
    want = torch_models.channels_last(want)
    assert got.shape == want.shape == (2, 4 * latents - 3, 32, 48, 3)
    assert float(jnp.max(jnp.abs(got))) <= 1.0
    assert all(relative_error(got[:, f], want[:, f]) < BOUND for f in range(got.shape[1]))


def test_a_swapped_pair_of_weights_is_seen():
    _, graph, state = pair("one block")
    video = moving_video(5)
    right, _ = program(graph, "posterior")(state, video)
    kernel = state["encoder"]["down_blocks"][3]["time_conv"]["kernel"]
    kept = kernel[...]
    kernel[...] = kept[::-1]  # the order of time
    wrong, _ = program(graph, "posterior")(state, video)
    kernel[...] = kept
    assert relative_error(wrong, right) > 1e-2


@pytest.mark.parametrize("name", SIZES)
def test_export_is_the_file_that_was_read(name):
    theirs, graph, state = pair(name)
    config = nnx.merge(graph, state).config
    exported = to_torch(table.rules(config), state)
    assert all(
        np.array_equal(exported[key], value) for key, value in torch_models.tensors(theirs).items()
    )
    again = AutoencoderKLWan.from_config(table.config_to_json(config))
    again.load_state_dict(
        {key: torch.from_numpy(value.copy()) for key, value in exported.items()}, strict=True
    )


def test_published_size_has_diffusers_tensors():
    with torch.device("meta"):
        theirs = AutoencoderKLWan()
    config = table.config_from_json(dict(theirs.config))
    _, shapes = abstract(config)
    ours = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    assert (len(ours), sum(ours)) == (194, 126_892_531)
    names = {rule.torch for rule in table.rules(config)}
    assert names == set(theirs.state_dict())
