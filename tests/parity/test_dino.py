"""DINO's vision transformer against transformers' ViTModel, with every parameter drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import ViTConfig, ViTModel

from checkpoints_convert import dino as table
from checkpoints_convert import store
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.dino import DEVIATION, MEAN
from tests.helpers.comparison import largest_relative_error

BOUND = 1e-4
SIZES = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=224,
    patch_size=32,
    layer_norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    """As transformers saves it, with the layer behind the class token that DINO does not have."""
    path = tmp_path_factory.mktemp("dino")
    original.save_pretrained(path)
    assert any(name.startswith("pooler") for name in store.open_tensors(path))
    return path


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)


def class_tokens(model, pictures):
    """The original's class token after the last norm, from pixels in ImageNet's normalisation."""
    given = ((pictures + 1) / 2 - np.float32(MEAN)) / np.float32(DEVIATION)
    with torch.no_grad():
        found = model(torch.from_numpy(given.astype(np.float32)).permute(0, 3, 1, 2))
    return found.last_hidden_state[:, 0].numpy()


def test_features_equal_the_original(original, folder, pictures):
    ours = nnx.jit(lambda m, x: m(x))(table.load(folder), jnp.asarray(pictures))
    assert largest_relative_error(ours, class_tokens(original, pictures)) < BOUND


def test_a_written_folder_is_read_by_transformers(folder, pictures, tmp_path):
    network = table.load(folder)
    table.save(network, tmp_path)
    again, report = ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(pictures))
    assert largest_relative_error(ours, class_tokens(again.eval(), pictures)) < BOUND
    jax.tree.map(np.testing.assert_array_equal, nnx.state(network), nnx.state(table.load(tmp_path)))


def test_a_torch_file_is_read(folder, tmp_path):
    tensors = {
        name: torch.from_numpy(np.array(t)) for name, t in store.open_tensors(folder).items()
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(table.load(tmp_path)),
        nnx.state(table.load(folder)),
    )


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("image_size", 256, "position_embeddings [1, 50, 24] instead of [1, 65, 24]"),
        ("image_size", 230, "pictures of 230 pixels do not divide into patches of 32"),
        ("num_attention_heads", 5, "width 24 does not divide into 5 heads"),
        ("num_attention_heads", 0, "a size is below 1"),
        ("hidden_act", "relu", "hidden_act is 'relu', only 'gelu' is supported"),
        ("model_type", "swin", "model_type is 'swin', only 'vit' is supported"),
        ("patch_size", None, "has no 'patch_size'"),
    ],
)
def test_another_network_is_refused_in_one_line(folder, tmp_path, field, value, reason):
    values = store.read_json(folder / "config.json") | {field: value}
    values = {name: entry for name, entry in values.items() if entry is not None}
    store.write_json(tmp_path / "config.json", values)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError) as refused:
        table.load(tmp_path)
    assert reason in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_size_of_pictures_is_refused_in_one_line(folder):
    with pytest.raises(UserError, match=r"224 x 224 pixels, not 64 x 96; resize them$"):
        table.load(folder)(jnp.zeros((1, 64, 96, 3)))
