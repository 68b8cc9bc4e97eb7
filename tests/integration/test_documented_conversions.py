"""Every conversion that docs/checkpoints.md shows for a file runs on a small file of that name."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_convert import checkpoint, spiece, store
from tests.helpers.convert import PIPELINE, run
from tests.helpers.layouts import TEXT_FILE, VACE, VAE_FILE, WAN, original
from tests.helpers.paths import ROOT
from tests.helpers.quantized_files import quantise, values
from tests.helpers.spiece_model import MODEL

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
SECTION = PAGE.partition("## What people have")[2].partition("| you have |")[0]
COMMANDS = re.findall(r"`(idgrpo-convert import [^`]+)`", SECTION)
WEIGHTS = "diffusion_pytorch_model.safetensors"
WHOLE = ["text_encoder", "tokenizer", "transformer", "vae"]


def config_beside(file: Path, source: Path = VACE) -> None:
    """Small models have heads of another width than the published ones, which a config states."""
    shutil.copy(source / "config.json", file.parent / "config.json")


def written(file: Path, tensors: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_file(file, tensors)
    config_beside(file)


def of_torch(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()}


def fp16_folder(path: Path) -> None:
    shutil.copytree(PIPELINE, path)
    for file in list(path.rglob("*.safetensors")):
        half = {name: value.astype(np.float16) for name, value in values(file).items()}
        store.write_file(file.with_name(file.name.replace(".safe", ".fp16.safe")), half)
        file.unlink()


def cached(path: Path) -> None:
    commit = "0" * 40
    shutil.copytree(PIPELINE, path / "snapshots" / commit)
    (path / "refs").mkdir()
    (path / "refs" / "main").write_text(commit)


def t2v(path: Path) -> None:
    """The plain model under the golden VACE model, with the other networks."""
    shutil.copytree(WAN, path)
    own = {name: value for name, value in values(VACE).items() if not name.startswith("vace")}
    store.write_file(path / WEIGHTS, own)
    config = store.read_json(VACE / "config.json")
    config = {name: value for name, value in config.items() if not name.startswith("vace")}
    store.write_json(path / "config.json", config | {"model_type": "t2v"})


def eight(kind: str, scaled: str | None) -> dict[str, np.ndarray]:
    return quantise(values(VACE), kind, scaled)[0]


def encoder(path: Path, scaled: str | None) -> None:
    tensors = values(PIPELINE / "text_encoder")
    if scaled:
        tensors = quantise(tensors, "float8_e4m3fn", scaled)[0]
    written(path, tensors | {spiece.TENSOR: np.frombuffer(MODEL, np.uint8)})
    (path.parent / "config.json").unlink()


def packed(path: Path) -> None:
    others = {"vae": values(WAN / VAE_FILE), "text_encoders.umt5xxl": values(WAN / TEXT_FILE)}
    tensors = {f"model.diffusion_model.{name}": value for name, value in values(VACE).items()}
    for part, own in others.items():
        tensors |= {f"{part}.{name}": value for name, value in own.items()}
    written(path, tensors)


def training(path: Path, *entries: str) -> None:
    content = {entry: of_torch(values(VACE)) for entry in entries}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, path)
    config_beside(path)


def phantom_shards(path: Path) -> None:
    tensors = values(WAN / WEIGHTS)
    shard = "Phantom_Wan_14B-00001-of-00001.safetensors"
    store.write_file(path.parent / shard, tensors)
    places = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    store.write_json(path, places)
    config_beside(path, WAN)


def phantom(path: Path) -> None:
    store.write_file(path, values(WAN / WEIGHTS))
    config_beside(path, WAN)


def comfyui_folder(path: Path) -> None:
    written(path / "wan2.1_vace_1.3B_fp8_scaled.safetensors", eight("float8_e4m3fn", "tensor"))
    store.write_file(path / "wan_2.1_vae.safetensors", values(WAN / VAE_FILE))
    tensors = values(PIPELINE / "text_encoder") | {spiece.TENSOR: np.frombuffer(MODEL, np.uint8)}
    store.write_file(path / "umt5_xxl_fp16.safetensors", tensors)


def umt5(path: Path) -> None:
    shutil.copytree(PIPELINE / "text_encoder", path)
    tensors = values(path) | {"lm_head.weight": np.ones((4, 4), np.float32)}
    store.write_file(path / "model.safetensors", tensors)


# Name in the documentation -> function that makes the file.
FILES: dict[str, Callable[[Path], object]] = {
    "Wan2.1-VACE-1.3B-diffusers": lambda path: shutil.copytree(PIPELINE, path),
    "Wan2.1-VACE-1.3B-fp16": fp16_folder,
    "Wan2.1-VACE-1.3B": lambda path: shutil.move(original(path.parent, "vace"), path),
    "Wan2.1-T2V-1.3B": t2v,
    "models--Wan-AI--Wan2.1-VACE-1.3B-diffusers": cached,
    "Wan2.1_VAE.pth": lambda path: shutil.copy(WAN / VAE_FILE, path),
    "models_t5_umt5-xxl-enc-bf16.pth": lambda path: shutil.copy(WAN / TEXT_FILE, path),
    "umt5-xxl": umt5,
    "umt5_xxl_fp16.safetensors": lambda path: encoder(path, None),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": lambda path: encoder(path, "tensor"),
    "wan2.1_vace_1.3B_fp16.safetensors": lambda path: written(
        path, {name: value.astype(np.float16) for name, value in values(VACE).items()}
    ),
    "Wan2_1-VACE_1_3B_fp8_e4m3fn.safetensors": lambda path: written(
        path, eight("float8_e4m3fn", None)
    ),
    "wan2.1_vace_1.3B_fp8_scaled.safetensors": lambda path: written(
        path, eight("float8_e4m3fn", "tensor")
    ),
    "Wan2_1-VACE_module_1_3B_bf16.safetensors": lambda path: store.write_file(
        path, {name: value for name, value in values(VACE).items() if name.startswith("vace")}
    ),
    "wan-aio.safetensors": packed,
    "epoch-3.pth": lambda path: training(path, "state_dict"),
    "last.pth": lambda path: training(path, "model", "ema"),
    "with_ema.safetensors": lambda path: written(
        path, values(VACE) | {f"ema.{name}": value for name, value in values(VACE).items()}
    ),
    "fsdp.safetensors": lambda path: written(
        path, {f"module.{name}": value for name, value in values(VACE).items()}
    ),
    "Phantom-Wan-1.3B.pth": phantom,
    "Phantom_Wan_14B.safetensors.index.json": phantom_shards,
    "model.safetensors": phantom,
    "comfyui-models": comfyui_folder,
}
PARTS = {"text_encoder": ("umt5", "models_t5"), "vae": ("Wan2.1_VAE",)}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_conversion_of_the_documentation_runs(tmp_path, monkeypatch, capsys, line):
    words = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    source = words[2]
    if source.startswith("Wan-AI/"):
        cached(tmp_path / "hub" / f"models--{source.replace('/', '--')}")
    else:
        FILES[source](tmp_path / source)
    if "--with" in words:
        FILES[words[words.index("--with") + 1]](tmp_path / words[words.index("--with") + 1])
    assert run(*words[1:]) == 0
    opened = checkpoint.open_checkpoint(tmp_path / "STORE")
    parts = [part for part, names in PARTS.items() if source.startswith(names)] or ["transformer"]
    row = next(row for row in SECTION.splitlines() if f"`{line}`" in row)
    found = sorted([*opened.networks, *(["tokenizer"] if opened.tokenizer else [])])
    if "pipeline" in row.split("|")[4] or "--with" in words:
        assert found == WHOLE
    else:
        assert [part for part in found if part != "tokenizer"] == parts
        assert ("tokenizer" in found) == source.startswith("umt5_xxl")
    loses = not row.split("|")[5].strip().startswith("none")
    said = capsys.readouterr().out
    assert ("left out" in said or "become" in said) or not loses


def test_every_row_of_the_table_is_a_command():
    rows = [row for row in SECTION.splitlines() if row.startswith("|")][2:]
    assert len(rows) == len(COMMANDS) >= 20
    assert set(FILES) - {"Wan2.1-T2V-1.3B"} <= {shlex.split(line)[2] for line in COMMANDS}
