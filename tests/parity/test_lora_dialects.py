"""Mixed LoRA in the libraries that people use: what peft and diffusers load is what we compute."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from flax import nnx
from peft import PeftModel

from checkpoints_convert import lora_names, store
from checkpoints_convert.lora_names import DIFFUSERS
from jax_idgrpo.sampling import adapters, pipeline
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error
from tests.helpers.convert import run
from tests.helpers.torch_models import channels_first, channels_last

BOUND = 1e-4
SUBSETS = {
    "every linear layer": lambda layer: True,
    "main blocks": lambda layer: layer.leaf.startswith("blocks."),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small VACE model in diffusers' layout, and its inputs."""
    folder = tmp_path_factory.mktemp("base")
    torch_models.vace(seed=2).save_pretrained(folder / "transformer")
    rng = np.random.default_rng(3)
    shapes = {"latents": (1, 3, 4, 6, 16), "text": (1, 5, 32), "control": (1, 3, 4, 6, 96)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return folder, arrays | {"timesteps": np.array([985], np.int32)}


def torch_base(folder):
    return WanVACETransformer3DModel.from_pretrained(folder / "transformer").eval()


def theirs(model, arrays) -> np.ndarray:
    with torch.no_grad():
        out = model(
            hidden_states=channels_first(arrays["latents"]),
            timestep=torch.tensor(arrays["timesteps"]),
            encoder_hidden_states=torch.tensor(arrays["text"]),
            control_hidden_states=channels_first(arrays["control"]),
            return_dict=False,
        )
    return channels_last(out[0])


@nnx.jit
def _velocity(model, latents, timesteps, text, control) -> jax.Array:
    return model(latents, timesteps, text, control=control)


def our_velocity(folder, arrays, adapter=None) -> np.ndarray:
    model = pipeline.load_transformer(folder)
    if adapter is not None:
        config = adapters.lora_config(adapter, model.config)
        model = adapters.with_adapter(model, config, adapters.load_lora_state(adapter, config))
    names = ("latents", "timesteps", "text", "control")
    return np.asarray(_velocity(model, *(jnp.asarray(arrays[name]) for name in names)))


def peft_folder(folder, config, choose, ranks_differ=True, **changes):
    """A PEFT folder as peft writes it: ranks and alphas of their own for chosen layers."""
    rng = np.random.default_rng(4)
    tensors, ranks, alphas = {}, {}, {}
    for number, layer in enumerate(filter(choose, lora_names.layers(config))):
        name, (inputs, outputs) = layer.spelled(DIFFUSERS), lora_names.shape(layer, config)
        rank, alpha = 1 + number % 3 if ranks_differ else 2, 2 + number % 4
        scale = 0.3 / np.sqrt(max(inputs, outputs))
        a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
        tensors |= {
            f"base_model.model.{name}.lora_{p}.weight": v for p, v in (("A", a), ("B", scale * b))
        }
        ranks[name if "." in name else f"^{name}"] = rank
        alphas[name if "." in name else f"^{name}"] = alpha
    folder.mkdir()
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    store.write_file(folder / "adapter_model.safetensors", tensors)
    values = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 2,
        "target_modules": [name.removeprefix("^") for name in ranks],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    store.write_json(folder / "adapter_config.json", values | changes)
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_we_agree_on_mixed_adapters(base, tmp_path, rslora):
    """Every linear layer with patterns, with and without rsLoRA; and peft on what we write."""
    folder, arrays = base
    config = pipeline.load_transformer(folder).config
    source = peft_folder(tmp_path / "a", config, SUBSETS["every linear layer"], use_rslora=rslora)
    want = theirs(PeftModel.from_pretrained(torch_base(folder), source).eval(), arrays)
    plain, got = theirs(torch_base(folder), arrays), our_velocity(folder, arrays, source)
    assert relative_error(want, plain) > 0.02
    assert relative_error(got, want) < BOUND
    assert relative_error(got - plain, want - plain) < BOUND
    assert run("import", source, tmp_path / "ours") == 0
    again = theirs(PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval(), arrays)
    assert relative_error(again, want) < 1e-6


@pytest.mark.parametrize("form", ["diffusers-lora", "comfyui", "kohya"])
def test_diffusers_loads_our_exports(base, tmp_path, form):
    """diffusers knows only the main blocks' names of ComfyUI and kohya, and one rank in a file."""
    folder, arrays = base
    config = pipeline.load_transformer(folder).config
    own = form == "diffusers-lora"
    choose = SUBSETS["every linear layer" if own else "main blocks"]
    source = peft_folder(tmp_path / "a", config, choose, ranks_differ=own)
    assert run("export", source, tmp_path / "anna", "--format", form) == 0
    model = torch_base(folder)
    pipe = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model
    )
    plain = theirs(model, arrays)
    pipe.load_lora_weights(
        tmp_path / "anna", weight_name=next((tmp_path / "anna").glob("*.safetensors")).name
    )
    want = theirs(model.eval(), arrays)
    got = our_velocity(folder, arrays, tmp_path / "anna")
    assert relative_error(want, plain) > 0.01
    assert relative_error(got - plain, want - plain) < BOUND


def test_a_merge_of_dora_is_pefts(base, tmp_path):
    folder, _ = base
    config = pipeline.load_transformer(folder).config
    source = peft_folder(
        tmp_path / "a", config, lambda layer: "attn2.to_" in layer.leaf, use_dora=True
    )
    file = source / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in store.open_tensors(file).items()}
    rng = np.random.default_rng(8)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = (1 + rng.random(len(tensors[name]))).astype(np.float32)
    store.write_file(file, tensors)
    merged = PeftModel.from_pretrained(torch_base(folder), source).merge_and_unload().eval()
    assert run("import", folder / "transformer", tmp_path / "store", "--merge", source) == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "diffusers") == 0
    ours = WanVACETransformer3DModel.from_pretrained(tmp_path / "out").eval()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "store" / "store.json").read_text())["merged"][0]["scale"] == 1
