"""The tokenizer inside ComfyUI's text encoder gives the ids of SentencePiece."""

import numpy as np
import pytest

from checkpoints_convert import checkpoint, spiece, store
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.sampling.tokenizer import read_tokenizer
from tests.helpers.convert import run
from tests.helpers.layouts import TEXT_FILE, VACE, VAE_FILE, WAN
from tests.helpers.paths import GOLDEN
from tests.helpers.quantized_files import quantise, values
from tests.helpers.spiece_model import IDS, MODEL

EMBEDDED = np.frombuffer(MODEL, np.uint8)
ENCODER = GOLDEN / "tiny_vace" / "text_encoder"


def ids_of(tokenizer) -> dict[str, list[int]]:
    return {text: list(tokenizer(text)["input_ids"]) for text in IDS}


def test_an_embedded_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, capsys):
    file = tmp_path / "umt5_xxl_fp16.safetensors"
    store.write_file(file, values(ENCODER) | {spiece.TENSOR: EMBEDDED})
    assert run("import", file, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "tokenizer: made from the SentencePiece model" in said
    assert "left out" not in said
    assert ids_of(read_tokenizer(tmp_path / "out" / "tokenizer")) == IDS


def test_a_folder_of_comfyuis_files_is_a_pipeline(tmp_path, capsys):
    """Transformer, text encoder and VAE in one file each, all in ComfyUI's forms."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "config.json").write_bytes((VACE / "config.json").read_bytes())
    eight, _ = quantise(values(VACE), "float8_e4m3fn", "tensor")
    named = {f"model.diffusion_model.{name}": value for name, value in eight.items()}
    store.write_file(folder / "wan2.1_vace_fp8_scaled.safetensors", named)
    store.write_file(folder / "wan_2.1_vae.safetensors", values(WAN / VAE_FILE))
    text, _ = quantise(values(ENCODER), "float8_e4m3fn", "tensor")
    del text["shared.scale_weight"]  # embeddings have none
    text |= {spiece.TENSOR: EMBEDDED, "scaled_fp8": np.zeros(0, eight["head.head.weight"].dtype)}
    store.write_file(folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text)
    assert checkpoint.open_checkpoint(folder).missing() == []
    assert run("export", folder, tmp_path / "out", "--format", "diffusers") == 0
    assert capsys.readouterr().out.count("become bfloat16") == 2
    assert ids_of(read_tokenizer(tmp_path / "out" / "tokenizer")) == IDS
    with pytest.warns(UserWarning, match="become float32"):
        pipe = pipeline.load_pipeline(folder)
    assert pipe.kind == "vace"
    assert ids_of(pipe.tokenizer) == IDS
    assert TEXT_FILE.endswith(".pth")


@pytest.mark.parametrize(
    "data",
    [
        b"fake sentencepiece model bytes " * 20,
        MODEL[:-7],
        b"",
        b"\x0a\xff\xff\xff\xff\x0f" + bytes(10),
        b"\x0a" + b"\xff" * 12,
        MODEL.replace(b"</s>", b"</t>"),
    ],
)
def test_an_embedded_tokenizer_that_is_none_is_left_out_and_told(tmp_path, data, capsys):
    file = tmp_path / "umt5.safetensors"
    store.write_file(file, values(ENCODER) | {spiece.TENSOR: np.frombuffer(data, np.uint8)})
    assert run("import", file, tmp_path / "out") == 0
    assert "its embedded tokenizer is left out, as it cannot be read" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert run("verify", ENCODER, tmp_path / "out") == 0
