"""The reward on disk: folders that the original libraries wrote are read, scored, written and read again bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.qwen_vl import QwenReward, Sequences
from jax_idgrpo.rewards.vlm import files
from jax_idgrpo.rewards.vlm.settings import Settings
from tests.helpers import vlm_folders
from tests.helpers.comparison import relative_error


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base, adapter form and whole form, and the torch networks of the latter two."""
    root = tmp_path_factory.mktemp("vlm")
    vlm_folders.write_base(root / "base")
    adapter = vlm_folders.write_released(root / "base", root / "adapter")
    whole = vlm_folders.write_released(root / "base", root / "whole", whole=True)
    return root, adapter, whole


def text_score(model: QwenReward, ids):
    """Scores of a text without pictures, read at its last token."""
    count = len(ids)
    position = jnp.broadcast_to(jnp.arange(count), (3, 1, count))
    given = Sequences(
        ids=jnp.asarray([ids]),
        vision=jnp.full((1, count), -1),
        position=position,
        token=jnp.asarray([[count - 1]]),
        mask=jnp.ones((1, count), bool),
    )
    return jax.jit(lambda model, given: model(given, None, None))(model, given)[0, 0]


def torch_score(model, ids):
    inner = model.base_model.model
    with torch.no_grad():
        hidden = inner.model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
        ).last_hidden_state
        return inner.rm_head(hidden[:, -1]).float().numpy()[0]


def equal(one: QwenReward, other: QwenReward) -> bool:
    states = [jax.tree.leaves(nnx.state(model)) for model in (one, other)]
    return all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(*states, strict=True)
    )


@pytest.mark.parametrize("form", ["adapter", "whole"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_released_folder_scores_as_in_torch(folders, form, merge):
    root, *torches = folders
    found = files.load(root / form, root / "base", "float32", merge)
    token = found.tokenizer.convert_tokens_to_ids("<|SA_reward|>")
    assert token == found.network.config.vocabulary - 1
    assert bool(jax.tree.leaves(nnx.state(found.network, LoRAParam))) != merge
    ids = [*vlm_folders.ids_of("how alike are they?"), token]
    assert (
        relative_error(text_score(found.network, ids), torch_score(torches[form == "whole"], ids))
        < 1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merge", [False, True])
def test_what_is_written_is_read_again_bit_for_bit(folders, tmp_path, merge, dtype):
    root = folders[0]
    if dtype == "bfloat16":
        vlm_folders.write_released(root / "base", tmp_path / "narrow", dtype=torch.bfloat16)
    found = files.load(
        root / "adapter" if dtype == "float32" else tmp_path / "narrow", root / "base", dtype, merge
    )
    files.save(found, tmp_path / "out", number=3)
    again = files.load(tmp_path / "out", None if merge else root / "base", dtype, False)
    assert equal(found.network, again.network)
    assert again.settings.rank == (0 if merge else 4)
    files.save(again, tmp_path / "twice", number=3)
    written = [
        sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in ("out", "twice")
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*written, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_has_the_tensors_of_the_original(folders, tmp_path, dtype):
    root = folders[0]
    vlm_folders.write_released(root / "base", tmp_path / "in", dtype=dtype)
    files.save(
        files.load(tmp_path / "in", root / "base", "float32", merge=False),
        tmp_path / "out",
        number=21,
    )
    from safetensors.torch import load_file

    for read, name in (
        (load_file, "adapter_model.safetensors"),
        (torch.load, "non_lora_state_dict.pth"),
    ):
        want, got = (read(tmp_path / side / "checkpoint-21" / name) for side in ("in", "out"))
        assert got.keys() == want.keys()
        assert all(
            got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]) for key in want
        )


def test_names_of_transformers_5_are_read_too(folders, tmp_path):
    root = folders[0]
    vlm_folders.write_released(root / "base", tmp_path / "new", rename=lambda name: name)
    assert equal(
        *(
            files.load(path, root / "base", "float32").network
            for path in (root / "adapter", tmp_path / "new")
        )
    )


def test_a_reward_starts_as_its_base_with_a_fresh_adapter(folders):
    root = folders[0]
    settings = Settings(
        dimensions=("VQ", "MQ", "TA"), rank=2, alpha=4.0, mean=(0.0,) * 3, deviation=(1.0,) * 3
    )
    first, same, other = (
        files.start(root / "base", settings, jax.random.key(seed), "float32") for seed in (0, 0, 1)
    )
    assert equal(first.network, same.network)
    assert not equal(first.network, other.network)
    assert first.network.config.vocabulary == len(vlm_folders.SPECIAL) + 256 + 3
    assert first.network.rm_head.kernel.shape == (64, 3)
    assert not np.any(first.network.layers.mlp.up_proj.lora_b[...])
    assert np.any(first.network.layers.mlp.up_proj.lora_a[...])
    assert (
        first.tokenizer.convert_tokens_to_ids("<|TA_reward|>")
        == first.network.config.vocabulary - 1
    )


def damaged(folders, tmp_path, change):
    """A copy of the adapter form and of the base, changed."""
    root = folders[0]
    for name in ("base", "adapter"):
        shutil.copytree(root / name, tmp_path / name)
    change(tmp_path)
    return tmp_path / "adapter", tmp_path / "base"


def edit(path, section, **values):
    found = json.loads(path.read_text())
    found[section] |= values
    path.write_text(json.dumps(found))


MODEL = files.MODEL_CONFIG


def other_rows(root):
    path = root / "adapter" / "checkpoint-21" / "non_lora_state_dict.pth"
    tensors = torch.load(path)
    name = next(name for name in tensors if "embed_tokens" in name)
    torch.save(tensors | {name: tensors[name][:-1]}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "base" / "tokenizer.json").unlink(),
            "tokenizer.json: cannot be read",
        ),
        (
            lambda root: (root / "base" / "tokenizer.json").write_text("{}"),
            "cannot read this tokenizer|does not know",
        ),
        (
            lambda root: edit(root / "adapter" / MODEL, "data_config", eval_dim=["SB", "SC"]),
            "output_dim is 1, but eval_dim",
        ),
        (
            lambda root: edit(root / "adapter" / MODEL, "model_config", output_dim=2),
            "output_dim is 2",
        ),
        (
            lambda root: edit(
                root / "adapter" / MODEL, "model_config", use_special_tokens=False, reward_token=""
            ),
            "reward_token",
        ),
        (lambda root: edit(root / "adapter" / MODEL, "peft_lora_config", lora_r=8), "mis-shaped"),
        (
            lambda root: edit(root / "adapter" / MODEL, "peft_lora_config", use_rslora=True),
            "plain LoRA",
        ),
        (
            lambda root: edit(root / "adapter" / MODEL, "peft_lora_config", lora_enable=False),
            "lora_enable false",
        ),
        (other_rows, r"table has 264 rows.*knows 265 tokens"),
        (lambda root: shutil.rmtree(root / "adapter" / "checkpoint-21"), "non_lora_state_dict.pth"),
        (lambda root: (root / "adapter" / MODEL).unlink(), "model_config.json"),
    ],
)
def test_what_cannot_be_read_is_answered_in_one_line(folders, tmp_path, change, message):
    folder, base = damaged(folders, tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        files.load(folder, base, "float32", merge=False)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_width_is_named(folders, tmp_path):
    vlm_folders.write_released(folders[0] / "base", tmp_path / "three", outputs=("VQ", "MQ", "TA"))
    path = tmp_path / "three" / "model_config.json"
    edit(path, "data_config", eval_dim=["TA"])
    edit(path, "model_config", output_dim=1)
    with pytest.raises(UserError, match="table has 267 rows|rm_head.weight"):
        files.load(tmp_path / "three", folders[0] / "base", "float32")


def test_a_missing_base_says_what_to_get(folders):
    with pytest.raises(
        UserError, match=r"needs the files of Qwen/Qwen2.5-VL-3B-Instruct.*reward.vlm_base"
    ):
        files.load(folders[0] / "adapter")
