"""Guided velocities of RefAlign and SkyReels-V3 against diffusers' Wan transformer on concatenated latents."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from checkpoints_convert import rules
from checkpoints_convert import vae as vae_table
from checkpoints_convert import wan as table
from jax_idgrpo import rng
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.vae import WanVAE
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.sampling import adapters, policy
from jax_idgrpo.sampling.conditioning import Conditioning
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error
from tests.helpers.torch_models import channels_first, channels_last

ROWS, FRAMES, SLOTS, LENGTH, WIDTH = 3, 3, 4, 7, 32
PHOTOS = (1, 3, 2)  # per row
TIMESTEP = 731
BOUND, MISTAKE = 1e-5, 1e-2


@functools.cache
def model():
    """Return diffusers' transformer, ours with the same weights as a function of the scales, and inputs."""
    torch_model = torch_models.wan()
    config = table.config_from_json(json.loads(torch_model.to_json_string()))
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
        )
    )
    tensors = torch_models.tensors(torch_model)
    plain = nnx.merge(graph, rules.to_jax(table.rules(config), tensors, abstract))
    adapted = adapters.add_adapter(plain, 1, 1.0, rng.key(0, "init"))
    draw = np.random.default_rng(4)
    arrays = {
        "x": draw.standard_normal((ROWS, FRAMES, 8, 12, 16)),
        "text": draw.standard_normal((ROWS, LENGTH, WIDTH)),
        "negative": draw.standard_normal((LENGTH, WIDTH)),
        "photos": draw.standard_normal((ROWS, SLOTS, 8, 12, 16)),
    }
    for row, count in enumerate(PHOTOS):
        arrays["photos"][row, count:] = 0
    return (
        torch_model,
        adapted,
        {name: array.astype(np.float32) for name, array in arrays.items()},
    )


def published(scales, slots, photos_read_text):
    """Compute each row by itself with torch, from the published formulas.

    Args:
      scales: guidance of the prompt and of the photos; (1, 1) is a single branch.
      slots: latent frames after the video, filled with zeros; None has one per photo.
      photos_read_text: False removes the answer of the text from the tokens of the photos.
    """
    torch_model, _, given = model()
    tokens = FRAMES * 4 * 6
    hooks = []
    if not photos_read_text:

        def only_video(module, inputs, output):
            return torch.cat([output[:, :tokens], torch.zeros_like(output[:, tokens:])], dim=1)

        hooks = [block.attn2.register_forward_hook(only_video) for block in torch_model.blocks]

    def velocity(row, photos, text):
        latents = np.concatenate([given["x"][row], photos])[None]
        answer = torch_model(
            channels_first(latents),
            timestep=torch.tensor([TIMESTEP]),
            encoder_hidden_states=torch.from_numpy(text[None]),
            return_dict=False,
        )[0]
        return channels_last(answer)[0, :FRAMES]

    rows = []
    for row, count in enumerate(PHOTOS):
        photos = given["photos"][row, : slots or count]
        both = velocity(row, photos, given["text"][row])
        if scales != (1.0, 1.0):
            seen = velocity(row, photos, given["negative"])
            none = velocity(row, 0 * photos, given["negative"])
            both = none + scales[1] * (seen - none) + scales[0] * (both - seen)
        rows.append(both)
    for hook in hooks:
        hook.remove()
    return np.stack(rows)


def ours(scales, padding_attended, photos_read_text):
    """Compute all rows in one batch with our policy."""
    _, adapted, given = model()
    actor, _, base = policy.split(adapted, *scales)
    asked = Conditioning(
        text=jnp.asarray(given["text"]),
        control=None,
        frame_mask=jnp.ones((ROWS, FRAMES), bool),
        references=jnp.asarray(PHOTOS),
        reference_latents=jnp.asarray(given["photos"]),
        padding_attended=padding_attended,
        photos_read_text=photos_read_text,
    )
    inputs = policy.PolicyInputs(None, base, asked, jnp.asarray(given["negative"]))
    return jax.jit(actor.velocity)(inputs, given["x"], jnp.int32(TIMESTEP))


@pytest.mark.parametrize(
    ("scales", "slots", "photos_read_text"),
    [
        pytest.param((7.5, 5.0), None, False, id="refalign"),
        pytest.param((1.0, 1.0), SLOTS, True, id="skyreels"),
        pytest.param((7.5, 5.0), SLOTS, True, id="skyreels with guidance"),
    ],
)
def test_guided_velocity_equals_the_published_formula(scales, slots, photos_read_text):
    """Rows with one to three photos in one batch, against each row computed alone."""
    want = published(scales, slots, photos_read_text)
    got = ours(scales, slots is not None, photos_read_text)
    assert relative_error(got, want) < BOUND
    # Both properties matter: Phantom, with masked padding and text for all tokens, is another model.
    assert relative_error(published(scales, None, True), want) > MISTAKE


def test_sampled_latents_of_a_photo_equal_the_posterior_of_diffusers():
    torch_model = torch_models.vae(latents_mean=[0.1] * 16, latents_std=[1.5] * 16)
    config = vae_table.config_from_json(json.loads(torch_model.to_json_string()))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    network = nnx.merge(
        graph,
        rules.to_jax(vae_table.rules(config), torch_models.tensors(torch_model), abstract),
    )
    draw = np.random.default_rng(6)
    photo = draw.uniform(-1, 1, (1, 1, 16, 24, 3)).astype(np.float32)
    noise = draw.standard_normal((1, 1, 2, 3, 16)).astype(np.float32)
    posterior = torch_model.encode(channels_first(photo)).latent_dist
    want = channels_last(posterior.mean + posterior.std * channels_first(noise))
    encode = nnx.jit(lambda network, photo, noise: network.encode(photo, None, noise))
    got = encode(network, photo, noise)
    assert relative_error(got, (want - 0.1) / 1.5) < BOUND
    assert relative_error(encode(network, photo, 0 * noise), (want - 0.1) / 1.5) > MISTAKE
