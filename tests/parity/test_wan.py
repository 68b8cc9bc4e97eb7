"""The transformer against diffusers and the golden arrays of the original repository, random weights and inputs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tests.parity import torch_models
from tests.parity.torch_models import channels_first, channels_last, relative_error

from checkpoints_convert import rules, wan as table
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanTransformer

BOUND = 1e-5


def converted(torch_model, dtype="float32", **changes) -> WanTransformer:
    """Our model with the torch model's weights, through the real table."""
    config = table.config_from_json(json.loads(torch_model.to_json_string()) | changes)
    model = nnx.eval_shape(lambda: WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    return nnx.merge(graph, rules.to_jax(table.rules(config), torch_models.tensors(torch_model), abstract))


def inputs(seed=1, batch=2):
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((batch, 7, 32))
    text[0, 5:], text[1, 3:] = 0, 0
    arrays = (rng.standard_normal((batch, 3, 8, 12, 16)), text, rng.standard_normal((batch, 3, 8, 12, 96)))
    latents, text, control = (a.astype(np.float32) for a in arrays)
    return latents, np.array([999, 111], np.int32), text, control


def torch_velocity(model, latents, timesteps, text, control=None, scale=None):
    extra = {} if control is None else dict(
        control_hidden_states=channels_first(control), control_hidden_states_scale=torch.tensor(scale)
    )
    out = model(channels_first(latents), torch.from_numpy(timesteps), torch.from_numpy(text), return_dict=False, **extra)
    return channels_last(out[0])


def test_smoke():
    m = torch_models.wan()
    latents, t, text, control = inputs()
    got = jax.jit(converted(m))(latents, t, text)
    print(relative_error(got, torch_velocity(m, latents, t, text)))
    for vl, n in (((0, 2), 4), ((0, 5), 6), ((0, 2, 4), 5)):
        m = torch_models.vace(vl, num_layers=n)
        sc = np.linspace(0.7, 1.3, len(vl)).astype(np.float32)
        want = torch_velocity(m, latents, t, text, control, sc)
        mm = converted(m)
        print(relative_error(jax.jit(lambda *a: mm(*a))(latents, t, text, control, sc), want))
