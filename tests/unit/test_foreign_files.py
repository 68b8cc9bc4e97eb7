"""Files that people have mean what their writers meant; others are named in one true line."""

import json
import os
import pickle
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jax_idgrpo as idg
from checkpoints_convert import __main__ as command
from checkpoints_convert import checkpoint, file_types, hub, lora, store
from jax_idgrpo import cli
from jax_idgrpo.cli import paths
from jax_idgrpo.config import Config, ModelConfig, RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import adapters, pipeline
from jax_idgrpo.training import setup
from tests.helpers import face_files
from tests.helpers.paths import GOLDEN

PIPELINE, ADAPTER = (
    GOLDEN / "tiny_vace",
    GOLDEN / "lora_peft_tiny",
)  # the adapter has rank 4 and alpha 8
WAN, VACE = GOLDEN / "wan_original_tiny", GOLDEN / "vace_original_tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEADER = {lora.HEADER: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}


def run(*words) -> int:
    return command.run([str(word) for word in words])


def refused(*words) -> str:
    """The one line with which a command ends."""
    with pytest.raises(UserError) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor) for name, tensor in store.open_tensors(path).items()}


def bare() -> dict[str, np.ndarray]:
    """The golden adapter's tensors without a prefix."""
    return {name.removeprefix(lora.PEFT_PREFIX): value for name, value in values(ADAPTER).items()}


def written(
    file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_file(file, tensors, metadata)
    return file


def original_names(name: str) -> str:
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o")):
        name = name.replace(ours, theirs)
    return re.sub(r"to_([qkv])", r"\1", name)


# ---- alpha is never guessed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anna-and-ben.safetensors", "epoch-4.safetensors"])
@pytest.mark.parametrize("give", ["folder", "file"])
def test_a_renamed_file_keeps_the_alpha_of_the_config_beside_it(tmp_path, name, give):
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / name)
    source = folder if give == "folder" else folder / name
    assert adapters.lora_scale(source) == (4, 8.0)
    assert run("import", source, tmp_path / "out") == 0
    assert run("verify", ADAPTER, tmp_path / "out") == 0


def test_pefts_names_without_a_config_need_an_alpha_from_the_user(tmp_path):
    file = shutil.copy(ADAPTER / "adapter_model.safetensors", tmp_path)
    for words in (("inspect", file), ("import", file, tmp_path / "out")):
        assert "its alpha is not known, since no adapter_config.json is beside it" in refused(
            *words
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--alpha"):
        adapters.lora_scale(file)
    assert run("import", file, tmp_path / "out", "--alpha", "8") == 0
    assert run("verify", ADAPTER, tmp_path / "out") == 0


def test_a_config_without_alpha_needs_one_from_the_user(tmp_path):
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    config = store.read_json(folder / "adapter_config.json")
    del config["lora_alpha"]
    store.write_json(folder / "adapter_config.json", config)
    assert "adapter_config.json has no lora_alpha" in refused("import", folder, tmp_path / "out")
    assert run("import", folder, tmp_path / "out", "--alpha", "8") == 0
    assert run("verify", ADAPTER, tmp_path / "out") == 0


@pytest.mark.parametrize("key", ["lora_alpha", "alpha", "ss_network_alpha"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", ""])
def test_alpha_is_read_from_the_header(tmp_path, prefix, key):
    file = written(
        tmp_path / "x.safetensors",
        {prefix + name: value for name, value in bare().items()},
        {key: "16.0"},
    )
    assert adapters.lora_scale(file) == (4, 16.0)


def test_diffusers_names_without_alpha_mean_the_rank_and_it_is_said(tmp_path, capsys):
    file = written(
        tmp_path / "x.safetensors", {f"transformer.{name}": value for name, value in bare().items()}
    )
    assert adapters.lora_scale(file) == (4, 4.0)
    assert run("inspect", file) == 0
    assert run("import", file, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("states no alpha; taken as the rank") == 2
    assert run("import", file, tmp_path / "out", "--alpha", "8") == 0
    assert adapters.lora_scale(tmp_path / "out") == (4, 8.0)


def test_two_alphas_are_not_chosen_between(tmp_path):
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    written(folder / "adapter_model.safetensors", values(ADAPTER), {"lora_alpha": "4"})
    assert "its alpha is 8 in adapter_config.json, 4 in lora_alpha in its header" in refused(
        "inspect", folder
    )
    assert "8 in adapter_config.json, 3 in --alpha" in refused(
        "import", ADAPTER, tmp_path / "out", "--alpha", "3"
    )
    assert "is no adapter" in refused("import", PIPELINE / "vae", tmp_path / "out", "--alpha", "3")
    assert "no positive number" in refused("import", ADAPTER, tmp_path / "out", "--alpha", "-1")
    file = written(
        tmp_path / "y.safetensors",
        {f"transformer.{n}": v for n, v in bare().items()},
        {"alpha": "None"},
    )
    assert "alpha is 'None', which is no finite number" in refused("inspect", file)


def test_a_config_counts_for_its_own_adapter_alone(tmp_path):
    """A diffusers file beside a PEFT adapter is another adapter."""
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    tensors = {f"transformer.{name}": value for name, value in bare().items()}
    assert adapters.lora_scale(written(folder / "pytorch_lora_weights.safetensors", tensors)) == (
        4,
        4.0,
    )
    assert adapters.lora_scale(folder) == (4, 8.0)


def test_the_older_name_of_pefts_weights_is_read(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    shutil.copy(ADAPTER / "adapter_config.json", folder)
    written(tmp_path / "w.pth", values(ADAPTER)).rename(folder / "adapter_model.bin")
    assert run("verify", ADAPTER, folder) == 0


# ---- what an adapter is ----------------------------------------------------------------------------------------------


def with_names(rename, extra=None):
    def made(tensors):
        named = {rename(name): value for name, value in tensors.items()}
        return named | (extra(tensors) if extra is not None else {})

    return made


def beside(suffix: str, shape=()):
    """A tensor `suffix` for every module."""
    return lambda tensors: {
        n.replace("lora_A.weight", suffix): np.ones(shape, np.float32)
        for n in tensors
        if "lora_A" in n
    }


def down_up(name: str) -> str:
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


UNREAD = {
    "lokr": (
        lambda tensors: {"lycoris_blocks_0_self_attn_q.lokr_w1": np.ones((8, 8), np.float32)},
        "LyCORIS adapter such as LoKr",
    ),
    "loha": (
        lambda tensors: {"blocks.0.attn1.to_q.hada_w1_a": np.ones((8, 8), np.float32)},
        "is a LyCORIS adapter",
    ),
    "dora": (with_names(str, beside("lora_magnitude_vector", (48,))), "is a DoRA adapter"),
    "diff": (
        with_names(
            lambda name: f"diffusion_model.{down_up(name)}",
            lambda _: {"diffusion_model.head.diff_b": np.ones(3)},
        ),
        "diff and diff_b tensors, which are not LoRA",
    ),
    "bias": (with_names(str, beside("lora_B.bias", (48,))), "lora_bias"),
    "prefix": (with_names(lambda name: f"model.{name}"), "names that start with 'model.'"),
    "two prefixes": (
        with_names(lambda name: f"transformer.base_model.model.{name}"),
        "names that start with 'transformer.base_model.model.'",
    ),
    "whole layers": (
        with_names(str, lambda _: {"proj_out.weight": np.ones((4, 4))}),
        "holds proj_out.weight beside the LoRA",
    ),
}


@pytest.mark.parametrize("dialect", UNREAD)
def test_an_adapter_that_is_not_read_is_named_for_what_it_is(tmp_path, dialect):
    make, what = UNREAD[dialect]
    file = written(tmp_path / "style.safetensors", make(bare()))
    for words in (("inspect", tmp_path), ("inspect", file), ("import", file, tmp_path / "out")):
        assert what in refused(*words)
    with pytest.raises(UserError, match=re.escape(what)):
        adapters.lora_scale(file)
    assert not (tmp_path / "out").exists()


def test_inspect_finds_what_is_no_number(tmp_path):
    tensors = values(ADAPTER)
    name = sorted(tensors)[5]
    tensors[name][1, 2] = np.nan
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    written(folder / "adapter_model.safetensors", tensors)
    assert f"tensor {name} holds NaN or infinite values" in refused("inspect", folder)
    pipe = shutil.copytree(PIPELINE / "vae", tmp_path / "vae")
    tensors = values(pipe)
    tensors["decoder.conv_in.bias"][0] = np.inf
    written(pipe / WEIGHTS, tensors)
    assert "tensor decoder.conv_in.bias holds NaN or infinite values" in refused("inspect", pipe)


def test_inspect_says_what_an_adapter_is_and_whether_it_changes_anything(tmp_path, capsys):
    assert run("inspect", ADAPTER) == 0
    told = capsys.readouterr().out
    assert "adapter: rank 4, alpha 8, for width 48, 4 blocks, 2 vace_blocks" in told
    assert "changes nothing" not in told
    folder = shutil.copytree(ADAPTER, tmp_path / "a")
    tensors = {name: value * ("lora_A" in name) for name, value in values(ADAPTER).items()}
    written(folder / "adapter_model.safetensors", tensors)
    assert run("inspect", folder) == 0
    assert "this adapter changes nothing: every lora_B is zero" in capsys.readouterr().out


def wider(tensors):
    return {
        name: np.concatenate([value, value], axis=1 if "lora_A" in name else 0)
        for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    ("make", "base", "what"),
    [
        (wider, "vace", "made for width 96, this model has 48"),
        (
            dict,
            "wan",
            r"made for a VACE model, this one has no VACE blocks \(plain Wan or Phantom\)",
        ),
        (
            lambda t: {n.replace("blocks.3.", "blocks.4."): v for n, v in t.items()},
            "vace",
            "made for 5 blocks, this model has 4",
        ),
    ],
)
def test_an_adapter_of_another_model_is_told_by_its_sizes(tmp_path, make, base, what):
    file = written(
        tmp_path / "x.safetensors", {f"transformer.{n}": v for n, v in make(bare()).items()}, HEADER
    )
    place = PIPELINE if base == "vace" else WAN
    config = checkpoint.open_part(place, "transformer").config
    with pytest.raises(UserError, match=what) as caught:
        adapters.lora_config(file, config)
    assert len(str(caught.value)) < 250 + len(str(file))
    assert "\n" not in str(caught.value)
    assert re.search(
        what, refused("export", file, tmp_path / "out", "--format", "merged", "--base", place)
    )


# ---- files that are no weights ---------------------------------------------------------------------------------------

ONNX = b"\x08\x06\x12\x07pytorch\x1a\x051.8.0" + bytes(500)
FOREIGN = {
    "gguf": (
        b"GGUF\x03\x00\x00\x00" + bytes(100),
        "a GGUF file, whose quantised weights are not read",
    ),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file (such as a Keras .h5)"),
    "onnx": (ONNX, "an ONNX file"),
    "gz": (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
    "html": (b"\n<!DOCTYPE html><html><head>", "a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer",
    ),
    "json": (b'{"r": 4}', "a JSON file, not weights"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy array"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(1000), "nothing but zeros"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "is a pickle, but not one of torch.save"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_of_another_kind_is_told_by_its_first_bytes(tmp_path, kind, name):
    content, what = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    for words in (("inspect", tmp_path / name), ("import", tmp_path, tmp_path / "out")):
        line = refused(*words)
        assert what in line
        assert name in line
        assert "truncated" not in line


@pytest.mark.parametrize("kind", ["gguf", "h5", "onnx"])
def test_a_folder_of_such_files_alone_names_them(tmp_path, kind):
    (tmp_path / f"w600k.{kind}").write_bytes(FOREIGN[kind][0])
    (tmp_path / "README.md").write_text("weights")
    assert FOREIGN[kind][1] in refused("inspect", tmp_path)


def test_face_networks_of_other_libraries_are_told_what_is_needed(tmp_path):
    graph = face_files.model([], [face_files.initializer("conv.weight", np.ones(3, np.float32))])
    (tmp_path / "det_10g.onnx").write_bytes(graph)
    line = refused(
        "faces",
        tmp_path / "out",
        "--detector",
        tmp_path / "det_10g.onnx",
        "--embedder",
        tmp_path / "det_10g.onnx",
    )
    assert "an ONNX file" in line
    assert "deepface's .pth files" in line
    assert "backbone.pth" in line


def test_an_archive_is_not_taken_for_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr("model/weights.h5", b"x")
    assert "is a ZIP archive and no file of torch.save" in refused(
        "inspect", tmp_path / "model.bin"
    )


@pytest.mark.parametrize("part", ["model.safetensors.aria2", None])
def test_an_unfinished_download_is_not_read(tmp_path, part):
    """aria2 gives a file its whole length at once, so that the rest of it is zeros."""
    file = shutil.copy(
        VACE / WEIGHTS, tmp_path / ("model.safetensors" if part else "model.safetensors.part")
    )
    if part:
        (tmp_path / part).write_bytes(b"\0\1")
    assert "is an unfinished download" in refused("inspect", file)


def test_a_config_that_is_a_pointer_or_a_page_is_told(tmp_path):
    folder = shutil.copytree(PIPELINE / "vae", tmp_path / "vae")
    for kind in ("pointer", "html"):
        (folder / "config.json").write_bytes(FOREIGN[kind][0])
        assert FOREIGN[kind][1] in refused("inspect", folder)


@pytest.mark.parametrize(
    ("code", "kind"), [("F8_E8M0", "mxfp8"), ("F6_E2M3", "fp6"), ("F4", "fp4")]
)
def test_small_floats_are_no_damage(tmp_path, code, kind):
    header = {
        "blocks.0.self_attn.q.weight": {"dtype": code, "shape": [2, 2], "data_offsets": [0, 4]}
    }
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    line = refused("inspect", tmp_path)
    assert f"{kind} weights are not read" in line
    assert "get the bfloat16" in line
    assert "damaged" not in line


def test_quantised_tensors_of_torch_are_not_taken_for_an_attack(tmp_path):
    data = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_qtensor\n)Rs."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", data)
    line = refused("inspect", tmp_path / "w.pth")
    assert "quantised" in line
    assert "not read" in line
    assert "trust" not in line


# ---- files that are not whole ----------------------------------------------------------------------------------------


def sharded(folder: Path) -> list[Path]:
    tensors = values(VACE / WEIGHTS)
    shutil.copytree(VACE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = store.shard_names("diffusion_pytorch_model", 2)
    parts = dict(
        zip(
            names, (dict(list(tensors.items())[:40]), dict(list(tensors.items())[40:])), strict=True
        )
    )
    for name, part in parts.items():
        written(folder / name, part)
    places_of = {name: file for file, part in parts.items() for name in part}
    store.write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": places_of})
    return [folder / name for name in names]


def test_a_missing_shard_is_named(tmp_path):
    _, second = sharded(tmp_path / "m")
    assert run("inspect", tmp_path / "m") == 0
    second.unlink()
    line = refused("inspect", tmp_path / "m")
    assert f"its shard {second.name} is not beside it; get what is missing" in line


def test_matrices_of_zeros_are_told_wherever_weights_are_read(tmp_path, capsys):
    """A shard whose second half was never written has its right length."""
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    tensors = values(folder / "transformer")
    lost = [name for name in tensors if name.startswith("blocks.2.") and name.endswith("weight")]
    matrices = [name for name in lost if tensors[name].ndim > 1]
    written(
        folder / "transformer" / WEIGHTS,
        tensors | {name: np.zeros_like(tensors[name]) for name in lost},
    )
    assert run("inspect", folder) == 0
    assert (
        f"transformer: {len(matrices)} matrices hold nothing but zeros (blocks.2."
        in capsys.readouterr().out
    )
    assert run("import", folder, tmp_path / "out") == 0
    assert f"{len(matrices)} matrices hold nothing but zeros" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=f"{len(matrices)} matrices hold nothing but zeros"):
        pipeline.load_transformer(folder)
    capsys.readouterr()
    assert run("inspect", PIPELINE) == 0
    assert "nothing but zeros" not in capsys.readouterr().out


# ---- folders as they lie on people's disks ---------------------------------------------------------------------------


def test_hidden_files_are_passed_over(tmp_path):
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    for part in ("transformer", "vae", "text_encoder"):
        for file in list((folder / part).iterdir()):
            (folder / part / f"._{file.name}").write_bytes(b"\0\5\26\7" + bytes(4092))
    assert run("verify", PIPELINE, folder) == 0
    lonely = shutil.copytree(ADAPTER, tmp_path / "a")
    (lonely / "adapter_model.safetensors").rename(lonely / "mine.safetensors")
    (lonely / "._mine.safetensors").write_bytes(bytes(4096))
    assert adapters.lora_scale(lonely) == (4, 8.0)


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.fp16.safetensors"],
        ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"],
        [
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        ],
    ],
)
def test_the_file_without_a_variant_stands_before_the_others(tmp_path, names):
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    half = {name: value.astype(np.float16) for name, value in values(folder / "vae").items()}
    for name in names:
        written(folder / "vae" / name, half)
    assert run("verify", PIPELINE, folder) == 0
    (folder / "vae" / WEIGHTS).unlink()
    if len(names) == 1:  # alone it is what there is
        assert checkpoint.open_checkpoint(folder).networks["vae"].source.name == names[0]
    else:
        assert "keep one of them there" in refused("inspect", folder)


def test_an_index_of_a_variant_stands_behind_the_whole_file(tmp_path):
    folder = shutil.copytree(PIPELINE / "vae", tmp_path / "m")
    half = {name: value.astype(np.float16) for name, value in values(folder).items()}
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    written(folder / shard, half)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    store.write_json(index, {"metadata": {}, "weight_map": dict.fromkeys(half, shard)})
    assert run("verify", PIPELINE / "vae", folder) == 0
    (folder / WEIGHTS).unlink()
    assert checkpoint.open_checkpoint(folder).networks["vae"].source == index


def cached(tmp_path: Path, source: Path, commit: str = "0123abcd") -> Path:
    """An entry of the Hugging Face cache: links into blobs."""
    entry = tmp_path / "hub" / "models--Wan-AI--Wan"
    for file in [file for file in source.rglob("*") if file.is_file()]:
        blob = entry / "blobs" / str(abs(hash(file)))
        link = entry / "snapshots" / commit / file.relative_to(source)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    return entry


def test_an_entry_of_the_hugging_face_cache_means_its_main_snapshot(tmp_path):
    entry = cached(tmp_path, PIPELINE)
    assert run("verify", PIPELINE, entry) == 0
    assert idg.load_pipeline(entry).kind == "vace"
    assert "pass one of its entries, such as" in refused("inspect", tmp_path / "hub")
    (entry / "refs" / "main").write_text("../../elsewhere")
    assert "without its main snapshot; pass" in refused("inspect", entry)
    with pytest.raises(UserError, match="snapshots/0123abcd"):
        idg.load_pipeline(entry)


def test_an_adapter_in_the_cache_is_found_too(tmp_path):
    assert adapters.lora_scale(cached(tmp_path, ADAPTER)) == (4, 8.0)


@pytest.mark.parametrize("place", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_name_on_the_hub_means_its_snapshot_in_the_cache(tmp_path, monkeypatch, place):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    inside = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    folder = tmp_path / inside.get(place, "")
    folder = tmp_path / ".cache/huggingface/hub" if place == "HOME" else folder
    monkeypatch.setenv(place, str(tmp_path))
    entry = cached(tmp_path, PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    entry.rename(folder / entry.name)
    monkeypatch.chdir(tmp_path)
    assert run("verify", PIPELINE, "Wan-AI/Wan") == 0
    if place == "HOME":
        assert idg.load_pipeline("Wan-AI/Wan").kind == "vace"


def test_a_name_on_the_hub_that_cannot_be_had_is_answered_with_the_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "Wan-AI/Wan2.1-VACE-1.3B-diffusers"
    command_line = f"hf download {name} --local-dir Wan2.1-VACE-1.3B-diffusers"
    assert command_line in refused("inspect", name)
    with pytest.raises(UserError, match=f"hf download {name}"):
        idg.load_pipeline(name)
    with pytest.raises(UserError, match="hf download me/adapter"):
        paths.adapter_path("me/adapter")
    assert not hub.is_name(Path("runs/mine/export"))
    assert not hub.is_name(tmp_path / "x")
    (tmp_path / "runs").mkdir()
    assert "does not exist; check the path" in refused("inspect", "runs/mine")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    line = refused("inspect", name)
    assert "huggingface_hub is not installed" in line
    assert command_line in line


def test_a_name_on_the_hub_is_downloaded_to_the_cache(tmp_path, monkeypatch, capsys):
    """The library is replaced: tests have no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def download(name, cache_dir, ignore_patterns):
        if name != "Wan-AI/Wan":
            raise ConnectionError("no route\nto host")
        entry = cached(tmp_path, PIPELINE)
        shutil.copytree(entry, Path(cache_dir) / entry.name, symlinks=True, dirs_exist_ok=True)
        return str(Path(cache_dir) / entry.name / "snapshots" / "0123abcd")

    library = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: library)
    line = refused("inspect", "Wan-AI/Other")
    assert "cannot be downloaded: no route to host" in line
    assert "hf download Wan-AI/Other" in line
    assert run("verify", PIPELINE, "Wan-AI/Wan") == 0
    assert "downloading Wan-AI/Wan from the Hugging Face Hub" in capsys.readouterr().err
    assert run("verify", PIPELINE, "Wan-AI/Wan") == 0
    assert "downloading" not in capsys.readouterr().err


def test_a_counter_beside_the_weights_is_passed_over_and_counted(tmp_path, capsys):
    folder = shutil.copytree(PIPELINE / "transformer", tmp_path / "t")
    written(folder / WEIGHTS, values(folder) | {"step": np.array(1000, np.int64)})
    assert run("inspect", folder) == 0
    assert "transformer: 1 extra: step" in capsys.readouterr().out
    assert run("import", folder, tmp_path / "out") == 0
    assert "left out 1 tensors that it does not have: step" in capsys.readouterr().out
    assert run("verify", PIPELINE / "transformer", tmp_path / "out") == 0
    pipeline.load_transformer(folder)
    written(
        folder / WEIGHTS, values(PIPELINE / "transformer") | {"scale": np.array(1.0, np.float32)}
    )
    assert "1 unexpected: scale" in refused("inspect", folder)


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "module.", "_orig_mod.", "module._orig_mod.", "diffusion_model."],
)
def test_what_wraps_every_name_of_a_network_is_taken_off(tmp_path, prefix):
    folder = shutil.copytree(VACE, tmp_path / "m")
    written(
        folder / WEIGHTS, {prefix + name: value for name, value in values(VACE / WEIGHTS).items()}
    )
    assert run("import", folder, tmp_path / "out") == 0
    assert run("verify", VACE, tmp_path / "out") == 0


def test_the_text_encoder_as_one_file_with_its_tokenizer_inside_is_read(tmp_path):
    tensors = values(PIPELINE / "text_encoder") | {"spiece_model": np.arange(9, dtype=np.uint8)}
    file = written(tmp_path / "umt5.safetensors", tensors)
    assert run("import", file, tmp_path / "out") == 0
    got, want = values(tmp_path / "out"), values(PIPELINE / "text_encoder")
    assert len(got) == len(want)


# ---- models that are not these ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["index", "folder", "boundary", "three", "original"])
def test_half_a_model_of_two_transformers_is_not_used(tmp_path, sign):
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = store.read_json(folder / "model_index.json")
    both = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    what = "is half of a pipeline with two transformers: "
    if sign == "index":
        shutil.rmtree(folder / "transformer_2")
        store.write_json(folder / "model_index.json", index | both)
        what += "the folder transformer_2/ is missing"
    elif sign == "folder":
        what += "transformer_2 in model_index.json, boundary_ratio in model_index.json is missing"
    elif sign == "boundary":
        store.write_json(folder / "model_index.json", index | both | {"boundary_ratio": 1.5})
        what = "boundary_ratio is 1.5; it must be between 0 and 1"
    elif sign == "three":
        third = {"transformer_3": both["transformer_2"]}
        store.write_json(folder / "model_index.json", index | both | third)
        what = "names transformer_2, transformer_3 beside transformer; one or two"
    elif sign == "original":
        shutil.rmtree(folder)
        shutil.copytree(WAN, folder)
        (folder / "high_noise_model").mkdir()
        what = "is half of a model with two transformers: low_noise_model/ is missing"
    for words in (
        ("inspect", folder),
        ("import", folder, tmp_path / "out"),
        ("export", folder, tmp_path / "out", "--format", "diffusers"),
        ("export", ADAPTER, tmp_path / "out", "--format", "merged", "--base", folder),
    ):
        assert what in refused(*words)
    for load in (
        lambda: idg.load_pipeline(folder),
        lambda: pipeline.load_transformer(folder),
        lambda: setup.load(
            Config(model=ModelConfig(path=str(folder)), reward=RewardConfig(faces="faces"))
        ),
    ):
        with pytest.raises(UserError, match=re.escape(what)):
            load()
    assert not (tmp_path / "out").exists()


def test_an_index_that_says_there_is_no_second_transformer_is_fine(tmp_path):
    """diffusers writes these fields for every Wan pipeline."""
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    index = store.read_json(folder / "model_index.json") | {
        "transformer_2": [None, None],
        "boundary_ratio": None,
    }
    store.write_json(folder / "model_index.json", index | {"expand_timesteps": False})
    assert checkpoint.open_checkpoint(folder).kind == "vace"
    store.write_json(folder / "model_index.json", index | {"expand_timesteps": True})
    assert "has expand_timesteps (Wan 2.2 TI2V), which is not supported" in refused(
        "inspect", folder
    )


def test_plain_wan_without_photos_is_told_what_to_pass():
    with pytest.raises(
        UserError,
        match=r"plain Wan \(T2V\), which takes no reference photos; pass a VACE checkpoint, or, if",
    ):
        idg.load_pipeline(WAN, kind=ModelConfig().kind)
    assert checkpoint.open_checkpoint(WAN, "phantom").kind == "phantom"


def test_image_to_video_models_are_named(tmp_path):
    folder = shutil.copytree(PIPELINE, tmp_path / "m")
    config = store.read_json(folder / "transformer" / "config.json")
    store.write_json(
        folder / "transformer" / "config.json", config | {"added_kv_proj_dim": 48, "image_dim": 64}
    )
    assert "this is an image-to-video model" in refused("inspect", folder)
    source = shutil.copytree(WAN, tmp_path / "original")
    extra = {
        "img_emb.proj.1.weight": np.ones((4, 4), np.float32),
        "blocks.0.cross_attn.k_img.weight": np.ones((4, 4), np.float32),
    }
    written(source / WEIGHTS, values(WAN / WEIGHTS) | extra)
    assert "this is an image-to-video model" in refused("inspect", source)


def test_vace_blocks_alone_are_named(tmp_path):
    tensors = values(VACE / WEIGHTS)
    written(
        tmp_path / "a" / "m.safetensors",
        {n: v for n, v in tensors.items() if n.startswith("vace_")},
    )
    assert "VACE blocks without the main model" in refused("inspect", tmp_path / "a")


# ---- runs and options ------------------------------------------------------------------------------------------------


def workdir(folder: Path, save_every: int = 20) -> Path:
    folder.mkdir()
    config = {"model": {}, "rollout": {}, "grpo": {}, "run": {"save_every": save_every}}
    store.write_json(folder / "config.json", config)
    return folder


def test_the_workdir_of_a_run_means_its_adapter(tmp_path):
    run_folder = workdir(tmp_path / "run")
    shutil.copytree(ADAPTER, run_folder / "export")
    assert paths.adapter_path(str(run_folder)) == run_folder / "export"
    assert paths.adapters([f"tuned={run_folder}"]) == {"tuned": run_folder / "export"}
    assert adapters.lora_scale(run_folder) == (4, 8.0)
    assert run("verify", ADAPTER, run_folder) == 0
    assert run("export", run_folder, tmp_path / "out", "--format", "peft") == 0


@pytest.mark.parametrize("place", ["run", "run/export"])
def test_a_run_without_an_adapter_yet_says_so(tmp_path, place):
    workdir(tmp_path / "run")
    for give in (paths.adapter_path, adapters.lora_scale):
        with pytest.raises(
            UserError, match=r"run: this run has not written an adapter yet \(run.save_every 20\)"
        ):
            give(str(tmp_path / place))
    assert "has not written an adapter yet" in refused(
        "export", tmp_path / place, tmp_path / "out", "--format", "peft"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "CONFIG", "--prompts", "a.csv", "--out", "o", "--prompts", "b.csv"],
        ["evaluate", "CONFIG", "--out", "o", "--out=p"],
        ["train", "CONFIG", "--workdir", "a", "--run.steps", "3", "--run.steps=4"],
        ["plan", "CONFIG", "--topology", "cpu:8", "--programs", "rollout", "--programs", "update"],
    ],
)
def test_a_value_that_would_be_lost_is_refused(words):
    with pytest.raises(UserError, match=r"^--[\w.]+ is given twice; give it once$"):
        cli.run(words)


def test_options_of_the_converter_are_given_once(tmp_path):
    words = ("export", ADAPTER, tmp_path / "x", "--format", "peft", "--format", "merged")
    assert refused(*words) == "--format is given twice; give it once"


# ---- names in what is said -------------------------------------------------------------------------------------------


def test_verify_names_tensors_as_the_files_do(tmp_path, capsys):
    folder = shutil.copytree(WAN, tmp_path / "m")
    tensors = values(WAN / WEIGHTS)
    tensors["blocks.0.self_attn.q.weight"][0, 0] += 1
    tensors["blocks.1.ffn.0.bias"] = tensors["blocks.1.ffn.0.bias"].astype(ml_dtypes.bfloat16)
    written(folder / WEIGHTS, tensors)
    assert run("verify", WAN, folder) == 1
    told = capsys.readouterr().out
    assert "transformer: blocks.0.self_attn.q.weight differs in 1 of" in told
    assert "transformer: blocks.1.ffn.0.bias has dtypes float32 and bfloat16" in told
    assert run("export", folder, tmp_path / "d", "--format", "diffusers") == 0
    capsys.readouterr()
    assert run("verify", WAN, tmp_path / "d") == 1
    told = capsys.readouterr().out
    assert (
        "transformer: blocks.0.self_attn.q.weight (second: blocks.0.attn1.to_q.weight) differs in 1 of"
        in told
    )


def test_no_first_bytes_of_weights_are_taken_for_another_file(tmp_path):
    """A header of any length may start like anything."""
    for length in (0x02_00_08, 0x46_55_47_47, 0x8B_1F):
        start = length.to_bytes(8, "little") + b'{"a":'
        (tmp_path / "w.safetensors").write_bytes(start)
        assert file_types.complaint(tmp_path / "w.safetensors") is None
