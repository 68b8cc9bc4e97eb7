"""The transformer against diffusers and the golden arrays of the original repository, random weights and inputs."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from checkpoints_convert import rules
from checkpoints_convert import wan as table
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN
from tests.helpers.torch_models import channels_first, channels_last

BOUND = 1e-5  # ||got - want|| / ||want|| against code that rounds like ours
GOLDEN_BOUND = 1e-4  # against the original code, whose timestep sinusoid is float64
MISTAKE = 1e-2  # what any wrong input must at least change


def load(config: WanConfig, tensors, layout="diffusers") -> WanTransformer:
    """Our model with torch weights, through the real table."""
    model = nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    )
    graph, abstract = nnx.split(model)
    return nnx.merge(graph, rules.to_jax(table.rules(config, layout), tensors, abstract))


def converted(torch_model) -> WanTransformer:
    return load(
        table.config_from_json(json.loads(torch_model.to_json_string())),
        torch_models.tensors(torch_model),
    )


def inputs():
    """B = 2, T = 3, H = 8, W = 12, L = 7 with zero rows, two timesteps."""
    rng = np.random.default_rng(1)
    text = rng.standard_normal((2, 7, 32))
    text[0, 5:], text[1, 3:] = 0, 0
    arrays = (rng.standard_normal((2, 3, 8, 12, 16)), text, rng.standard_normal((2, 3, 8, 12, 96)))
    latents, text, control = (array.astype(np.float32) for array in arrays)
    return latents, np.array([999, 111], np.int32), text, control


def torch_velocity(model, latents, timesteps, text, control=None, scale=None):
    arguments = {
        "timestep": torch.from_numpy(timesteps),
        "encoder_hidden_states": torch.from_numpy(text),
    }
    if control is not None:
        arguments["control_hidden_states"] = channels_first(control)
        arguments["control_hidden_states_scale"] = torch.from_numpy(scale)
    return channels_last(model(channels_first(latents), return_dict=False, **arguments)[0])


def test_wan_equals_diffusers():
    model = torch_models.wan()
    latents, timesteps, text, _ = inputs()
    want = torch_velocity(model, latents, timesteps, text)
    ours = jax.jit(converted(model))
    assert relative_error(ours(latents, timesteps, text), want) < BOUND
    padded = text.copy()
    padded[1, 3:] = text[0, :4]  # zero rows of text are tokens too
    for wrong in (
        (latents, timesteps[::-1].copy(), text),
        (latents, timesteps, padded),
        (latents.swapaxes(2, 3).reshape(latents.shape), timesteps, text),
        (latents[:, ::-1].copy(), timesteps, text),
    ):
        assert relative_error(ours(*wrong), want) > MISTAKE


@pytest.mark.parametrize(
    ("vace_layers", "num_layers", "eps"),
    [((0, 2), 4, 1e-6), ((0, 5), 6, 1e-2), ((0, 2, 4), 5, 1e-6)],
)
def test_vace_equals_diffusers(vace_layers, num_layers, eps):
    """Even and uneven groups; the large epsilon shows a norm that forgot its own."""
    model = torch_models.vace(vace_layers, num_layers=num_layers, eps=eps)
    arrays = inputs()
    scale = np.linspace(0.7, 1.3, len(vace_layers)).astype(np.float32)
    want = torch_velocity(model, *arrays, scale)
    ours = jax.jit(converted(model))
    assert relative_error(ours(*arrays, scale), want) < BOUND
    *others, control = arrays
    for wrong in (
        (control, 0 * scale),
        (control, scale[::-1].copy()),
        (control[:, ::-1].copy(), scale),
    ):
        assert relative_error(ours(*others, *wrong), want) > MISTAKE


def test_swapped_weights_are_noticed():
    """The comparison itself can fail: two weights of equal shape exchanged."""
    model = torch_models.wan(num_layers=1)
    latents, timesteps, text, _ = inputs()
    want = torch_velocity(model, latents, timesteps, text)
    ours = converted(model)
    attention = ours.blocks.attn2
    attention.to_k.kernel, attention.to_v.kernel = attention.to_v.kernel, attention.to_k.kernel
    assert relative_error(jax.jit(ours)(latents, timesteps, text), want) > MISTAKE


def test_original_wan_golden():
    config = json.loads((GOLDEN / "wan_original_tiny" / "config.json").read_text())
    tensors = load_file(GOLDEN / "wan_original_tiny" / "diffusion_pytorch_model.safetensors")
    ours = WanConfig(
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["dim"] // config["num_heads"],
        ffn_dim=config["ffn_dim"],
        text_dim=tensors["text_embedding.0.weight"].shape[1],
        freq_dim=config["freq_dim"],
    )
    arrays = np.load(GOLDEN / "wan_original_tiny.npz")
    model = jax.jit(load(ours, tensors, "original"))
    got = model(arrays["latents"], arrays["timesteps"], arrays["text"])
    assert relative_error(got, arrays["velocity"]) < GOLDEN_BOUND


def test_original_vace_golden():
    folder = GOLDEN / "tiny_vace" / "transformer"
    config = table.config_from_json(json.loads((folder / "config.json").read_text()))
    model = jax.jit(load(config, load_file(folder / "diffusion_pytorch_model.safetensors")))
    arrays = np.load(GOLDEN / "vace_original_tiny.npz")
    for scale, want in zip(arrays["control_scales"], arrays["velocity"], strict=True):
        got = model(
            *(arrays[name] for name in ("latents", "timesteps", "text", "control")), float(scale)
        )
        assert relative_error(got, want) < GOLDEN_BOUND
