"""Weights in 8-bit floats are read as what they stand for; other quantised files are named."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import checkpoint, lazy, quantized, store
from checkpoints_convert.rules import leaves
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import pipeline
from tests.helpers.convert import run
from tests.helpers.layouts import VACE
from tests.helpers.quantized_files import is_linear, quantise, values

CONFIG = VACE / "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = ["float8_e4m3fn", "float8_e5m2"]


@pytest.fixture(scope="module")
def original():
    return values(VACE / WEIGHTS)


def folder_of(tmp_path, tensors, metadata=None):
    """A folder with the config of the original layout and these weights."""
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(CONFIG.read_bytes())
    store.write_file(folder / WEIGHTS, tensors, metadata)
    return folder


def refused(*words) -> str:
    with pytest.raises(UserError) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scaled", [None, "tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_8_bits_are_read_as_what_they_stand_for(
    tmp_path, original, kind, scaled, capsys
):
    stored, meant = quantise(original, kind, scaled)
    if scaled is not None:
        stored["scaled_fp8"] = np.zeros(2, stored["blocks.0.self_attn.q.weight"].dtype)
        stored["blocks.0.self_attn.q.scale_input"] = np.ones((), np.float32)
    folder = folder_of(tmp_path, stored)
    for name, dtype in quantized.DTYPES.items():
        assert run("import", folder, tmp_path / name, "--dtype", name) == 0
        said = capsys.readouterr().out
        assert said.count("become") == 1
        assert f"{kind} tensors" in said
        assert f"become {name}" in said
        assert ("(exact)" in said) == (scaled is None)
        got = checkpoint.open_checkpoint(tmp_path / name).networks["transformer"]
        want = checkpoint.open_checkpoint(folder).networks["transformer"]
        by_name = {slot.name: tensor for slot, tensor in got.matched()}
        for slot, tensor in want.matched():
            value = meant[tensor.name]
            expected = value.astype(dtype) if is_linear(tensor.name, value) else value
            found = np.asarray(by_name[slot.name])
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, tensor.name)
        assert run("verify", folder, tmp_path / name, "--dtype", name) == 0


def test_a_network_is_loaded_from_8_bits_without_a_conversion(tmp_path, original):
    stored, meant = quantise(original, "float8_e4m3fn", "tensor", "weight_scale")
    with pytest.warns(UserWarning, match=r"float8_e4m3fn tensors, \d+ of them scaled, become"):
        model = pipeline.load_transformer(folder_of(tmp_path, stored))
    found = leaves(nnx.state(model))
    kernel = found["blocks.attn1.to_q.kernel"]
    assert kernel.dtype == np.float32
    for block in range(len(kernel)):
        want = meant[f"blocks.{block}.self_attn.q.weight"].T
        np.testing.assert_array_equal(np.asarray(kernel[block]), want)


def test_an_export_says_what_its_weights_were(tmp_path, original, capsys):
    """Directly, and by way of the store."""
    stored, _ = quantise(original, "float8_e5m2", "tensor")
    folder = folder_of(tmp_path, stored)
    assert run("import", folder, tmp_path / "store") == 0
    for source in (folder, tmp_path / "store"):
        assert run("export", source, tmp_path / "out", "--format", "original") == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("float8_e5m2 tensors") == 1
        assert "become bfloat16; what their quantisation lost stays lost" in card
    assert run("export", VACE, tmp_path / "out", "--format", "original") == 0
    assert "become" not in (tmp_path / "out" / "README.md").read_text()


def test_the_marker_of_newer_files_is_read(tmp_path, original):
    stored, _ = quantise(original, "float8_e4m3fn", "tensor", "weight_scale")
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    layer = "blocks.0.self_attn.q"
    marker = np.frombuffer(text.encode(), np.uint8)
    folder = folder_of(tmp_path, stored | {f"{layer}.comfy_quant": marker})
    assert run("import", folder, tmp_path / "out") == 0
    header = {"_quantization_metadata": json.dumps({"layers": {layer: {"format": "nvfp4"}}})}
    folder_of(tmp_path, stored, header)
    assert f"its layer {layer} is of format 'nvfp4'" in refused("inspect", folder)
    marker = np.frombuffer(b'{"format": "int8_tensorwise"}', np.uint8)
    folder_of(tmp_path, stored | {f"{layer}.comfy_quant": marker})
    assert "is of format 'int8_tensorwise'" in refused("inspect", folder)


def test_a_scale_of_one_beside_a_weight_of_more_bits_changes_nothing(tmp_path, original):
    name = "blocks.0.self_attn.q"
    ones = {f"{name}.scale_weight": np.ones((), np.float32)}
    folder = folder_of(tmp_path, original | ones)
    assert run("verify", VACE, folder) == 0
    twice = {f"{name}.scale_weight": np.full((), 2, np.float32)}
    tensors = checkpoint.open_network(folder_of(tmp_path, original | twice)).tensors
    np.testing.assert_array_equal(
        np.asarray(tensors[f"{name}.weight"]), 2 * original[f"{name}.weight"]
    )


@pytest.mark.parametrize(
    ("scale", "what"),
    [
        (np.full((), np.nan, np.float32), "holds a scale that is NaN, infinite or negative"),
        (np.full((), -1, np.float32), "holds a scale that is NaN, infinite or negative"),
        (np.full((), np.inf, np.float32), "holds a scale that is NaN, infinite or negative"),
        (np.ones(3, np.float32), "has shape [3], not one value or one per row"),
        (np.ones((2, 24, 2), np.float32), "has shape [2, 24, 2], not one value or one per row"),
        (np.ones((1, 48), np.float32), "has shape [1, 48], not one value or one per row"),
        (np.ones((0,), np.float32), "has shape [0], not one value or one per row"),
        (np.ones((), np.int32), "is int32"),
    ],
)
def test_a_scale_that_is_none_is_named(tmp_path, original, scale, what):
    stored, _ = quantise(original, "float8_e4m3fn", "tensor")
    name = "blocks.0.self_attn.q.scale_weight"
    folder = folder_of(tmp_path, stored | {name: scale})
    line = refused("import", folder, tmp_path / "out")
    assert f"tensor {name} " in line
    assert what in line
    assert WEIGHTS in line
    assert not (tmp_path / "out").exists()


def test_scales_without_weights_and_two_scales_are_named(tmp_path, original):
    stored, _ = quantise(original, "float8_e4m3fn", "tensor")
    one = np.ones((), np.float32)
    folder = folder_of(tmp_path, stored | {"blocks.9.self_attn.q.scale_weight": one})
    assert "blocks.9.self_attn.q.scale_weight is a scale without" in refused("inspect", folder)
    folder_of(tmp_path, stored | {"blocks.0.self_attn.q.weight_scale": one})
    assert "tensor blocks.0.self_attn.q.weight has two scales" in refused("inspect", folder)


@pytest.mark.parametrize(("kind", "code"), [("float8_e4m3fn", 0x7F), ("float8_e5m2", 0x7C)])
def test_what_is_no_number_in_8_bits_is_refused(tmp_path, original, kind, code):
    stored, _ = quantise(original, kind, "tensor")
    name = "blocks.1.ffn.0.weight"
    stored[name].view(np.uint8)[3, 5] = code
    folder = folder_of(tmp_path, stored)
    for words in (("inspect", folder), ("import", folder, tmp_path / "out")):
        assert f"tensor {name} holds NaN or infinite values" in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not lazy.finite(stored[name])


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, original):
    stored, _ = quantise(original, "float8_e4m3fn", "tensor")
    name = "blocks.0.ffn.0"
    stored[f"{name}.scale_weight"] = np.full((), 1e4, np.float32)
    folder = folder_of(tmp_path, stored)
    line = refused("import", folder, tmp_path / "out", "--dtype", "float16")
    assert f"tensor {name}.weight holds NaN or infinite values" in line
    assert run("import", folder, tmp_path / "out") == 0


def test_a_dtype_without_weights_to_dequantize_is_refused(tmp_path):
    line = refused("import", VACE, tmp_path / "out", "--dtype", "float16")
    assert "has no fp8 weights" in line
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_zeros_or_with_a_scale_of_zero_is_told(tmp_path, original, capsys):
    stored, _ = quantise(original, "float8_e4m3fn", "tensor")
    stored["blocks.0.ffn.0.weight"] = np.zeros_like(stored["blocks.0.ffn.0.weight"])
    stored["blocks.1.ffn.0.weight"].view(np.uint8)[:] = 0x80  # negative zeros
    stored["blocks.2.ffn.0.scale_weight"] = np.zeros((), np.float32)
    assert run("inspect", folder_of(tmp_path, stored)) == 0
    assert "3 matrices hold nothing but zeros" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"shape": [1 << 62, 0], "data_offsets": [0, 0]}, "of shape [4611686018427387904, 0]"),
        ({"shape": [1 << 31, 1 << 31], "data_offsets": [0, 4]}, "has 4 bytes"),
        ({"shape": [8], "data_offsets": [0, 8]}, "ends at byte"),
        ({"shape": [-4], "data_offsets": [0, 4]}, "of shape [-4]"),
        ({"shape": [4], "data_offsets": [-4, 0]}, "has 4 bytes"),
        ({"shape": [4], "data_offsets": [2, 6]}, "starts at byte 2 of the data instead of 0"),
        ({"shape": [2], "data_offsets": [0, 2]}, "are not the"),
    ],
)
@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
def test_headers_that_do_not_fit_their_file_are_refused(tmp_path, code, entry, what):
    data = 6 if entry["data_offsets"][0] == 2 else 4
    data = 0 if entry["data_offsets"] == [0, 0] else data
    text = json.dumps({"blocks.0.ffn.0.weight": {"dtype": code, **entry}}).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    line = refused("inspect", file)
    assert what in line
    assert "w.safetensors" in line


def test_tensors_that_overlap_are_refused(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [4]}
    header = {
        "a": {**entry, "data_offsets": [0, 4]},
        "a.scale_weight": {**entry, "data_offsets": [2, 6]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    assert "a.scale_weight starts at byte 2 of the data instead of 4" in refused("inspect", file)


def test_empty_tensors_do_not_state_sizes(tmp_path, original):
    name = "patch_embedding.weight"
    folder = folder_of(tmp_path, original | {name: np.zeros((0, 16, 1, 2, 2), np.float32)})
    (folder / "config.json").unlink()
    assert f"tensor {name} is of another shape" in refused("inspect", folder)


OTHERS = {
    "bitsandbytes NF4": "blocks.0.self_attn.q.weight.quant_state.bitsandbytes__nf4",
    "bitsandbytes 4 bits": "blocks.0.self_attn.q.weight.absmax",
    "bitsandbytes int8": "blocks.0.self_attn.q.SCB",
    "SVDQuant (nunchaku)": "transformer_blocks.0.qkv_proj.wscales",
    "GPTQ or AWQ": "blocks.0.self_attn.q.qzeros",
    "a packed integer format": "blocks.0.self_attn.q.qweight",
    "fp8 in blocks": "blocks.0.self_attn.q.weight_scale_inv",
    "NVFP4": "blocks.0.self_attn.q.weight_scale_2",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_quantised_formats_are_named(tmp_path, original, kind):
    folder = folder_of(tmp_path, original | {OTHERS[kind]: np.ones(4, np.float32)})
    for words in (("inspect", folder), ("import", folder, tmp_path / "out")):
        line = refused(*words)
        assert f"its tensor {OTHERS[kind]} is of {kind}" in line
        assert "get the bfloat16" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(), (7,), (300, 700), (3, 5, 7, 2), (1, 4), (0, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_chunks_of_8_bits_are_the_values_in_row_major_order(monkeypatch, shape, kind, dtype):
    monkeypatch.setattr(lazy, "CHUNK", 1 << 15)
    codes = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    stored = np.asarray(codes).view(getattr(ml_dtypes, kind))
    scale = np.float32(0.37)
    rows = np.random.default_rng(1).random(shape[:1] + (1,) * len(shape[1:]), np.float32)
    for factor in (np.asarray(scale), np.broadcast_to(rows, shape)):
        array = lazy.ScaledArray(stored, factor, np.dtype(dtype))
        want = (stored.astype(np.float32) * factor).astype(dtype)
        for moved, expected in ((array, want), (array.transpose(), want.transpose())):
            parts = list(lazy.iter_chunks(moved))
            assert all(part.flags.c_contiguous for part in parts)
            got = np.concatenate(parts).reshape(expected.shape) if parts else expected
            np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
        if array.ndim > 1 and len(want):
            part = np.asarray(array[1:, :2])
            assert part.dtype == dtype
            np.testing.assert_array_equal(part.astype(np.float32), want[1:, :2].astype(np.float32))
