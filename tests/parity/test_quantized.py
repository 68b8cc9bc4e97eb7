"""Dequantized weights are torch's, bit for bit, and files of 8-bit floats are those of torch."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints_convert import quantized, store

TORCH = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
KINDS = ["float8_e4m3fn", "float8_e5m2"]


def stored(kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a matrix with every value of 8 bits in random places, and scales for it."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).repeat(300)[: 256 * 299 + 1 * 256]
    codes = codes[torch.randperm(len(codes), generator=generator)].reshape(300, 256)
    rows = torch.rand(300, 1, generator=generator) * 3e-3
    scales = {"tensor": torch.tensor(0.0123), "one": torch.tensor([0.7]), "channel": rows}
    return codes.view(TORCH[kind]), scales | {"channel, flat": rows[:, 0].clone()}


def bits(array: np.ndarray) -> np.ndarray:
    """Return the bits, with every NaN alike."""
    wide = array.astype(np.float32)
    return np.where(np.isnan(wide), -1, array.view(f"u{array.dtype.itemsize}").astype(np.int64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_values_are_those_of_torch(tmp_path, kind, dtype):
    weight, scales = stored(kind)
    for name, scale in scales.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({"layer.weight": weight, "layer.scale_weight": scale.contiguous()}, file)
        tensors, _ = store.open_file(file)
        read = quantized.dequantized(tensors, file, quantized.DTYPES[dtype])
        got = np.asarray(read["layer.weight"])
        factor = scale[:, None] if name == "channel, flat" else scale
        want = (weight.to(torch.float32) * factor).to(TORCH[dtype])
        want = want.view(torch.int16).numpy() if dtype == "bfloat16" else want.numpy()
        want = want.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else want
        assert str(got.dtype) == dtype
        np.testing.assert_array_equal(bits(got), bits(want), name)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_files_hold_the_same_values(tmp_path, kind):
    weight, _ = stored(kind)
    tensors = {"layer.weight": weight, "part": weight[7:20, 3:9], "turned": weight.t()}
    torch.save(tensors, tmp_path / "w.pth")
    found, _ = store.open_file(tmp_path / "w.pth")
    for name, tensor in tensors.items():
        assert str(found[name].dtype) == kind
        got = np.asarray(found[name]).view(np.uint8)
        np.testing.assert_array_equal(got, tensor.view(torch.uint8).numpy(), name)


@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_are_written_as_torch_reads_them(tmp_path, kind):
    weight, _ = stored(kind)
    array = weight.view(torch.uint8).numpy().view(getattr(ml_dtypes, kind))
    store.write_file(tmp_path / "w.safetensors", {"w": array})
    from safetensors.torch import load_file

    read = load_file(tmp_path / "w.safetensors")["w"]
    assert read.dtype == TORCH[kind]
    assert torch.equal(read.view(torch.uint8), weight.view(torch.uint8))
