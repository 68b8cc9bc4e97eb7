"""The export of trained weights is a checkpoint of diffusers, which computes what our network computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanVACEPipeline
from flax import nnx

from checkpoints_convert.__main__ import run
from jax_idgrpo import config as c
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.sampling.adapters import saved_step
from jax_idgrpo.sampling.exports import save_checkpoint
from jax_idgrpo.sampling.weights import select_weights
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN
from tests.helpers.torch_models import channels_first, channels_last

BOUND = 1e-5


@nnx.jit
def velocity(model, latents, timesteps, text, control):
    return model(latents, timesteps, text, control=control)


def test_an_export_of_weights_loads_in_diffusers_and_becomes_an_original_folder(tmp_path):
    """Also one that replaces another and takes over its unchanged parts."""
    pipe = pipeline.load_pipeline(GOLDEN / "tiny_vace")
    weights = select_weights(pipe.transformer, "blocks.0,vace_blocks,proj_out")
    graph, state = nnx.split(pipe.transformer)
    trained, frozen = weights.split(state)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), trained
    )
    training = dataclasses.asdict(c.Config())
    out = tmp_path / "export"
    for step, params in ((1, trained), (2, moved)):
        save_checkpoint(out, pipe, weights.merge(params, frozen), training, step, reuse=step > 1)
        assert saved_step(out) == step

    loaded = WanVACEPipeline.from_pretrained(out, torch_dtype=torch.float32)
    given = {
        "latents": rng.normal(size=(2, 3, 4, 6, 16)),
        "text": rng.normal(size=(2, 5, pipe.transformer.config.text_dim)),
        "control": rng.normal(size=(2, 3, 4, 6, 96)),
    }
    given = {name: value.astype(np.float32) for name, value in given.items()}
    timesteps = np.array([985, 206], np.int32)
    theirs = loaded.transformer.eval()(
        hidden_states=channels_first(given["latents"]),
        timestep=torch.tensor(timesteps),
        encoder_hidden_states=torch.tensor(given["text"]),
        control_hidden_states=channels_first(given["control"]),
        return_dict=False,
    )
    arrays = (jnp.asarray(value) for value in (given["latents"], timesteps, given["text"]))
    inputs = (*arrays, jnp.asarray(given["control"]))
    found = velocity(nnx.merge(graph, weights.merge(moved, frozen)), *inputs)
    before = velocity(pipe.transformer, *inputs)
    assert relative_error(found, channels_last(theirs[0])) < BOUND
    assert relative_error(found, before) > 0.01
    assert loaded.scheduler.config.flow_shift == pipe.shift
    assert loaded.tokenizer("a man smiles").input_ids == pipe.tokenizer("a man smiles").input_ids

    original = tmp_path / "original"
    assert run(["export", str(out), str(original), "--format", "original"]) == 0
    assert run(["verify", str(out), str(original)]) == 0
