"""Files of weights in 8-bit floats, written as ComfyUI and Kijai do."""

from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints_convert import store

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def values(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file or folder."""
    return {name: np.array(tensor) for name, tensor in store.open_tensors(path).items()}


def is_linear(name: str, value: np.ndarray) -> bool:
    """Return whether quantised files hold this tensor in 8 bits."""
    return value.ndim == 2 and name.endswith(".weight")


def quantise(
    tensors: dict[str, np.ndarray], kind: str, scaled: str | None, suffix: str = "scale_weight"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Store the matrices in 8 bits.

    Args:
      tensors: tensors of a network.
      kind: float8_e4m3fn or float8_e5m2.
      scaled: None, "tensor" or "channel": what has a scale of its own.
      suffix: last part of the name of a scale.

    Returns:
      (tensors of the file, the float32 values that they stand for).
    """
    dtype = np.dtype(getattr(ml_dtypes, kind))
    stored, meant = {}, {}
    for name, value in tensors.items():
        value = value.astype(np.float32)
        if not is_linear(name, value):
            stored[name] = meant[name] = value.astype(ml_dtypes.bfloat16)
            continue
        scale = np.float32(1.0)
        if scaled is not None:
            axis = 1 if scaled == "channel" else None
            scale = np.abs(value).max(axis, keepdims=scaled == "channel") / LARGEST[kind]
            scale = np.asarray(scale, np.float32)
            stored[f"{name.removesuffix('.weight')}.{suffix}"] = scale
        stored[name] = (value / scale).astype(dtype)
        meant[name] = stored[name].astype(np.float32) * scale
    return stored, meant
