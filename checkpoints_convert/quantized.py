"""Read weights in 8-bit floats, with or without scales, and name other quantised formats.

ComfyUI's and Kijai's files store linear layers in `float8_e4m3fn` or `float8_e5m2`, plain or with
a float32 scale per tensor or per output channel. The weight is `stored * scale`, computed in
float32 and rounded once to the requested dtype. Names of the scale: `LAYER.scale_weight` or
`LAYER.weight_scale`. Markers and the scales of activations (`scale_input`, `input_scale`) carry no
weights. Facts from ComfyUI `comfy/ops.py`, `comfy/model_detection.py` and its `comfy_quant` format.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from checkpoints_convert.lazy import FileTensor, LazyTensor, ScaledArray, size
from jax_idgrpo.errors import UserError

FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
DTYPES = {  # of dequantized weights
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
DEFAULT = "bfloat16"
WEIGHT, SCALE = ".weight", r"\.(scale_weight|weight_scale)$"
ACTIVATION = r"\.(scale_input|input_scale)$"
MARKER = "scaled_fp8"  # name of an empty tensor in ComfyUI's scaled files
DESCRIPTION = ".comfy_quant"  # JSON in bytes: {"format": "float8_e4m3fn"}
DESCRIPTION_LIMIT = 4096  # bytes
REMEDY = "get the bfloat16, float16, float32 or fp8 file of this model"
# Endings of names that only one quantised format has, in the order in which they are examined.
FORMATS = (
    (r"\.quant_state\.bitsandbytes__nf4$", "bitsandbytes NF4"),
    (r"\.quant_state\.bitsandbytes__fp4$", "bitsandbytes FP4"),
    (r"\.(absmax|quant_map|nested_absmax)$", "bitsandbytes 4 bits"),
    (r"\.SCB$", "bitsandbytes int8"),
    (r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig)$", "SVDQuant (nunchaku)"),
    (r"\.(qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.qweight$", "a packed integer format (GPTQ, AWQ or nunchaku)"),
    (r"\.weight_scale_inv$", "fp8 in blocks (weight_scale_inv)"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\._data$|\.W_q$", "an integer format of quanto or HQQ"),
)

Values = TypeVar("Values")


@dataclasses.dataclass(frozen=True, eq=False)
class Dequantized:
    """A stored weight times its scale, computed on access.

    Attributes:
      tensor: stored values.
      scale: float32, of no axes, or with one value per output channel (the first axis).
      dtype: dtype of the result.
    """

    tensor: LazyTensor
    scale: np.ndarray
    dtype: np.dtype

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def origin(self) -> str:
        return self.tensor.origin

    def deferred(self) -> ScaledArray:
        """Return the values, not computed yet."""
        scale = np.broadcast_to(self.scale, self.shape) if self.scale.ndim else self.scale
        return ScaledArray(np.asarray(self.tensor), scale, self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.deferred().computed(), dtype=dtype)


def refuse(
    tensors: Mapping[str, LazyTensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Raise a UserError for quantised weights other than 8-bit floats.

    Args:
      tensors: tensors of a file, by name.
      file: the file, for messages.
      metadata: header of the file.
    """
    for pattern, kind in FORMATS:
        found = next((name for name in tensors if re.search(pattern, name)), None)
        if found is not None:
            raise UserError(
                f"{file}: its tensor {found} is of {kind}, whose quantised weights are not read; "
                f"{REMEDY}"
            )
    for name, tensor in tensors.items():
        if name.endswith(DESCRIPTION):
            _refuse_format(name.removesuffix(DESCRIPTION), _described(tensor), file)
    if "_quantization_metadata" in (metadata or {}):
        for layer, values in _layers((metadata or {})["_quantization_metadata"]).items():
            _refuse_format(layer, values, file)


def _described(tensor: LazyTensor) -> object:
    """Read the JSON in the bytes of a tensor; None if there is none."""
    if tensor.dtype != np.uint8 or size(tensor) > DESCRIPTION_LIMIT:
        return None
    try:
        return json.loads(np.asarray(tensor).tobytes())
    except ValueError:
        return None


def _layers(text: str) -> Mapping[str, object]:
    """Read the formats by layer of ComfyUI's header; none if it is unreadable."""
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return layers if isinstance(layers, dict) else {}


def _refuse_format(layer: str, values: object, file: Path) -> None:
    found = values.get("format") if isinstance(values, dict) else None
    if found not in [kind.name for kind in FP8]:
        raise UserError(
            f"{file}: its layer {layer} is of format {str(found)[:40]!r}, whose quantised weights "
            f"are not read; {REMEDY}"
        )


def is_companion(name: str) -> bool:
    """Return whether a tensor belongs to a quantised weight: a scale, a marker, a description."""
    return (
        name.rpartition(".")[2] == MARKER
        or name.endswith(DESCRIPTION)
        or re.search(f"{SCALE}|{ACTIVATION}", name) is not None
    )


def without_companions(tensors: Mapping[str, Values]) -> dict[str, Values]:
    """Return the tensors that are weights."""
    return {name: tensor for name, tensor in tensors.items() if not is_companion(name)}


def dequantized(
    tensors: Mapping[str, LazyTensor], file: Path, dtype: np.dtype
) -> dict[str, FileTensor]:
    """Replace 8-bit floats by their values in `dtype`, and drop scales and markers.

    A weight in another dtype with a scale keeps its dtype; with a scale of 1 it is not changed.

    Args:
      tensors: tensors of a network, by name.
      file: the file, for messages.
      dtype: dtype of the values.

    Raises:
      UserError: a scale has no weight, another shape than its weight, or is no positive number.
    """
    scales: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if re.search(SCALE, name):
            weight = re.sub(SCALE, WEIGHT, name)
            if weight not in tensors:
                raise UserError(
                    f"{file}: tensor {name} is a scale without {weight}; get the file again"
                )
            if weight in scales:
                raise UserError(f"{file}: tensor {weight} has two scales; get the file again")
            scales[weight] = _scale(tensor, tensors[weight], file)
    values: dict[str, FileTensor] = {}
    for name, tensor in without_companions(tensors).items():
        scale = scales.get(name, np.ones((), np.float32))
        if tensor.dtype in FP8:
            values[name] = Dequantized(tensor, scale, dtype)
        elif np.all(scale == 1):
            values[name] = tensor
        else:
            values[name] = Dequantized(tensor, scale, tensor.dtype)
    return values


def _scale(tensor: LazyTensor, weight: LazyTensor, file: Path) -> np.ndarray:
    """Read a scale as float32, of no axes or of shape [rows, 1, ...].

    Args:
      tensor: the scale.
      weight: the weight.
      file: the file, for messages.
    """
    rows = weight.shape[:1]
    is_per_row = tensor.shape[:1] == rows and math.prod(tensor.shape[1:]) == 1
    if math.prod(tensor.shape) != 1 and not is_per_row:
        raise UserError(
            f"{file}: tensor {tensor.name} has shape {list(tensor.shape)}, not one value or one "
            f"per row of {weight.name} {list(weight.shape)}; scales of blocks are not read, {REMEDY}"
        )
    if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype not in DTYPES.values():
        raise UserError(f"{file}: tensor {tensor.name} is {tensor.dtype}; get the file again")
    values = np.asarray(tensor).astype(np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UserError(
            f"{file}: tensor {tensor.name} holds a scale that is NaN, infinite or negative; get "
            "the file again"
        )
    if math.prod(tensor.shape) == 1:
        return values.reshape(())
    return values.reshape(*rows, *(1 for _ in weight.shape[1:]))


def stored(tensor: FileTensor) -> FileTensor:
    """Return the tensor as it is in the file."""
    return tensor.tensor if isinstance(tensor, Dequantized) else tensor


def notice(tensors: Iterable[FileTensor]) -> str | None:
    """Describe the weights that are dequantized, and what that loses; None if there are none."""
    found = [tensor for tensor in tensors if isinstance(tensor, Dequantized)]
    found = [tensor for tensor in found if tensor.tensor.dtype in FP8]
    if not found:
        return None
    stored = collections.Counter(str(tensor.tensor.dtype) for tensor in found)
    scaled = sum(bool((tensor.scale != 1).any()) for tensor in found)
    kinds = ", ".join(f"{count} {kind}" for kind, count in stored.items())
    exact = "" if scaled else " (exact)"
    with_scales = f", {scaled} of them scaled," if scaled else ""
    return (
        f"{kinds} tensors{with_scales} become {found[0].dtype}{exact}; what their quantisation "
        "lost stays lost"
    )
