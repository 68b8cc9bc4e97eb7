"""One network is taken out of files that hold more; the user chooses, or is told what was taken."""

import argparse
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch

from checkpoints_convert import checkpoint, store
from checkpoints_convert.contents import Options
from jax_idgrpo.errors import UserError
from tests.helpers.convert import PIPELINE, run
from tests.helpers.layouts import TEXT_FILE, VACE, VAE_FILE, WAN
from tests.helpers.quantized_files import quantise, values

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return values(VACE / WEIGHTS)


def refused(*words) -> str:
    with pytest.raises(UserError) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def source(tmp_path, file, content):
    """A folder with the config of the original layout and one file, of torch or of ours."""
    folder = tmp_path / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(VACE / "config.json", folder)
    if file.endswith(".pth"):
        torch.save(content, folder / file)
    else:
        store.write_file(folder / file, content)
    return folder


def of_torch(tensors, change=0.0):
    return {
        name: torch.from_numpy(value.astype(np.float32)) + change for name, value in tensors.items()
    }


def stored(folder):
    """The tensors of a store, by our names."""
    return {
        slot.name: np.asarray(tensor) for slot, tensor in checkpoint.open_network(folder).matched()
    }


def differ_by(folder, other, change) -> bool:
    a, b = stored(folder), stored(other)
    return all(np.allclose(a[name].astype(np.float32) + change, b[name], atol=1e-2) for name in a)


def optimizer():
    return {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "params": [0]}],
    }


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_the_weights_of_a_training_checkpoint_are_found(tmp_path, tensors, name, capsys):
    content = {name: of_torch(tensors), "optimizer": optimizer(), "epoch": 3, "loss": 0.5}
    folder = source(tmp_path, "epoch-3.pth", content)
    assert run("import", folder, tmp_path / "out") == 0
    assert f"transformer: its entry {name} is taken" in capsys.readouterr().out
    assert differ_by(tmp_path / "out", VACE, 0)


def test_several_sets_of_weights_are_listed_and_chosen_by_name(tmp_path, tensors, capsys):
    content = {
        "state_dict": {f"module.{name}": value for name, value in of_torch(tensors).items()},
        "ema": {"decay": 0.99, "shadow": of_torch(tensors, 1.0)},
        "optimizer": optimizer(),
    }
    folder = source(tmp_path, "last.pth", content)
    for words in (("inspect", folder), ("import", folder, tmp_path / "out")):
        line = refused(*words)
        assert "last.pth: holds 2 sets of weights: state_dict, ema.shadow; choose one" in line
        assert "--entry NAME" in line
    assert "no entry 'ema' with weights; choose one of state_dict, ema.shadow" in refused(
        "import", folder, tmp_path / "out", "--entry", "ema"
    )
    assert not (tmp_path / "out").exists()
    for name, change in (("state_dict", 0.0), ("ema.shadow", 1.0)):
        assert run("import", folder, tmp_path / name, "--entry", name) == 0
        assert f"its entry {name} is taken; left out: " in capsys.readouterr().out
        assert differ_by(tmp_path / name, VACE, -change)
        assert run("verify", folder, tmp_path / name, "--entry", name) == 0
    assert run("verify", folder, tmp_path / "ema.shadow", "--entry", "state_dict") == 1


def test_a_second_choice_into_the_same_folder_replaces_the_first(tmp_path, tensors):
    """What a killed run of the other choice left is not continued."""
    content = {"model": of_torch(tensors), "ema": of_torch(tensors, 1.0)}
    folder = source(tmp_path, "last.pth", content)
    for name, change in (("model", 0.0), ("ema", 1.0)):
        assert run("import", folder, tmp_path / "out", "--entry", name) == 0
        assert differ_by(tmp_path / "out", VACE, -change)


@pytest.mark.parametrize("prefix", ["ema.", "ema_model.", "model_ema."])
def test_an_average_beside_the_weights_is_chosen_by_name(tmp_path, tensors, prefix):
    average = {
        f"{prefix}{name}": value + np.asarray(1, value.dtype) for name, value in tensors.items()
    }
    folder = source(tmp_path, WEIGHTS, tensors | average)
    name = prefix.removesuffix(".")
    assert f"holds 2 sets of weights: weights, {name}; choose" in refused("inspect", folder)
    with pytest.raises(UserError, match="sets of weights"):
        checkpoint.open_checkpoint(folder)
    assert run("import", folder, tmp_path / "w", "--entry", "weights") == 0
    assert run("verify", VACE, tmp_path / "w") == 0
    assert run("import", folder, tmp_path / "e", "--entry", name) == 0
    assert run("verify", VACE, tmp_path / "e") == 1
    found = stored(tmp_path / "e")
    for ours, value in stored(tmp_path / "w").items():
        np.testing.assert_array_equal(found[ours], value + np.asarray(1, value.dtype))


def test_an_average_alone_is_taken_and_told(tmp_path, tensors, capsys):
    folder = source(tmp_path, WEIGHTS, {f"ema.{name}": value for name, value in tensors.items()})
    assert run("import", folder, tmp_path / "out") == 0
    assert "its entry ema (a moving average) is taken" in capsys.readouterr().out
    assert run("verify", VACE, tmp_path / "out") == 0


def test_an_entry_of_a_file_without_any_is_refused(tmp_path):
    assert "has no entry 'ema' with weights; choose one of weights" in refused(
        "import", VACE / WEIGHTS, tmp_path / "out", "--entry", "ema"
    )
    assert Options(entry="ema").base is None


def test_a_training_checkpoint_without_weights_of_a_model_is_refused(tmp_path):
    folder = source(tmp_path, "o.pth", {"optimizer": optimizer(), "epoch": 3})
    assert "its entry 'optimizer' is a dict, not a tensor" in refused("inspect", folder)


def test_a_checkpoint_with_objects_is_not_run(tmp_path, tensors):
    content = {"state_dict": of_torch(tensors), "args": argparse.Namespace(seed=1)}
    folder = source(tmp_path, "a.pth", content)
    line = refused("inspect", folder)
    assert "asks for argparse.Namespace" in line
    assert "nothing of it was run" in line


def test_mappings_that_contain_themselves_are_read_once(tmp_path, tensors):
    content = {"state_dict": of_torch(tensors)}
    content["again"] = content
    wide = {f"k{index}": {} for index in range(300)}
    for value in wide.values():
        value.update({f"j{index}": wide for index in range(300)})
    folder = source(tmp_path, "a.pth", content | {"wide": wide})
    assert checkpoint.open_checkpoint(folder).kind == "vace"


def test_the_transformer_is_taken_out_of_a_packed_file(tmp_path, tensors, capsys):
    """ComfyUI's checkpoints hold all networks of a pipeline in one file, also in 8 bits."""
    eight, _ = quantise(tensors, "float8_e4m3fn", "tensor")
    text, vae = values(WAN / TEXT_FILE), values(WAN / VAE_FILE)
    others = {f"text_encoders.umt5xxl.transformer.{name}": value for name, value in text.items()}
    others |= {f"vae.{name}": value for name, value in vae.items()}
    for own, loss in ((tensors, False), (eight | {"scaled_fp8": np.zeros(2, np.float32)}, True)):
        packed = {f"model.diffusion_model.{name}": value for name, value in own.items()} | others
        folder = source(tmp_path, "rapid-aio.safetensors", packed)
        assert run("import", folder, tmp_path / "out") == 0
        said = capsys.readouterr().out
        count = f"text_encoders ({len(text)} tensors), vae ({len(vae)} tensors)"
        assert f"the transformer of a packed file is taken; left out: {count}" in said
        assert ("become bfloat16" in said) == loss
        assert run("verify", VACE, tmp_path / "out") == int(loss)
        capsys.readouterr()


def test_a_prefix_that_some_tensors_lack_is_not_removed(tmp_path, tensors):
    names = list(tensors)
    renamed = {f"module.{name}": tensors[name] for name in names}
    folder = source(tmp_path, WEIGHTS, renamed | {"loss_head.weight": np.ones(3, np.float32)})
    line = refused("import", folder, tmp_path / "out")
    assert f"{len(names)} tensors have names that start with 'module.', loss_head.weight" in line
    del renamed[f"module.{names[0]}"]
    folder = source(tmp_path, WEIGHTS, renamed | {names[0]: tensors[names[0]]})
    line = refused("import", folder, tmp_path / "out")
    assert f"start with 'module.', {names[0]} does not" in line
    assert not (tmp_path / "out").exists()


# ---- a VACE module over T2V ---------------------------------------------------------------------


def module_of(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("vace_")}


def base_of(tmp_path, tensors, layout):
    """The T2V model under the VACE blocks, in a layout."""
    own = {name: value for name, value in tensors.items() if not name.startswith("vace_")}
    folder = tmp_path / "t2v"
    folder.mkdir()
    config = store.read_json(VACE / "config.json")
    config = {name: value for name, value in config.items() if not name.startswith("vace")}
    store.write_json(folder / "config.json", config | {"model_type": "t2v"})
    store.write_file(folder / WEIGHTS, own)
    if layout == "original":
        return folder
    out = tmp_path / layout
    if layout == "store":
        run("import", folder, out)
    else:
        run("export", folder, out, "--format", "diffusers")
    return out


@pytest.mark.parametrize("layout", ["original", "diffusers", "store"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_vace_module_over_its_base_is_the_whole_checkpoint(
    tmp_path, tensors, layout, prefix, capsys
):
    file = tmp_path / "module.safetensors"
    store.write_file(file, {prefix + name: value for name, value in module_of(tensors).items()})
    base = base_of(tmp_path, tensors, layout)
    assert run("import", file, tmp_path / "out", "--with", base) == 0
    assert "its VACE blocks are laid over" in capsys.readouterr().out
    assert run("verify", VACE, tmp_path / "out") == 0
    assert checkpoint.open_checkpoint(tmp_path / "out").kind == "vace"


def test_a_vace_module_takes_the_other_networks_of_its_base_along(tmp_path, tensors):
    shutil.copytree(WAN, tmp_path / "whole")
    base = base_of(tmp_path, tensors, "original")
    for name in (WEIGHTS, "config.json"):
        shutil.copy(base / name, tmp_path / "whole" / name)
    file = tmp_path / "module.safetensors"
    eight, meant = quantise(module_of(tensors), "float8_e4m3fn", "tensor")
    store.write_file(file, eight)
    assert run("import", file, tmp_path / "out", "--with", tmp_path / "whole") == 0
    opened = checkpoint.open_checkpoint(tmp_path / "out")
    assert opened.missing() == []
    found = {slot.torch: tensor for slot, tensor in opened.networks["transformer"].matched()}
    name = "vace_blocks.0.self_attn.q.weight"
    ours = "vace_blocks.0.attn1.to_q.kernel"
    want = meant[name].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found[ours]), want)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (
            lambda t: t.pop("vace_patch_embedding.weight"),
            "tensor vace_patch_embedding.weight is missing",
        ),
        (
            lambda t: t.pop("vace_blocks.0.before_proj.bias"),
            "1 missing: vace_blocks.0.before_proj.bias",
        ),
        (
            lambda t: t.update(
                {"vace_patch_embedding.weight": np.ones((96, 96, 1, 2, 2), np.float32)}
            ),
            "made for width 96, the model of",
        ),
        (
            lambda t: t.update({"vace_blocks.2.norm3.bias": np.ones(48, np.float32)}),
            "3 VACE blocks do not spread over the",
        ),
        (lambda t: t.update({"patch_embedding.bias": np.ones(48, np.float32)}), "is also in"),
    ],
)
def test_a_module_that_does_not_fit_its_base_is_named(tmp_path, tensors, spoil, what):
    part = module_of(tensors)
    spoil(part)
    file = tmp_path / "module.safetensors"
    store.write_file(file, part)
    base = base_of(tmp_path, tensors, "original")
    line = refused("import", file, tmp_path / "out", "--with", base)
    assert what in line
    assert "module.safetensors" in line
    assert not (tmp_path / "out").exists()


def test_a_module_over_a_vace_model_or_alone_is_refused(tmp_path, tensors):
    file = tmp_path / "module.safetensors"
    store.write_file(file, module_of(tensors))
    line = refused("import", file, tmp_path / "out", "--with", PIPELINE)
    assert "is a VACE model already" in line
    assert "--with T2V" in refused("import", file, tmp_path / "out")
