"""Represent tensors in files; their values are mapped into memory on access.

`np.asarray` of a tensor is a read-only view of the file, so a slice reads only its own bytes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jax_idgrpo.errors import UserError

CHUNK = 1 << 25  # bytes copied at a time
BLOCK = 1 << 18  # values examined at a time
TILE = (256, 64)  # rows and columns of a transposed copy that fit into the processor's cache

EXPONENTS = {  # bits of a float that are all set only in NaN and the infinities, if it has any
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}


@runtime_checkable
class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@runtime_checkable
class Described(Shaped, Protocol):
    """Anything with a shape and a dtype: an array, a tensor in a file, `jax.ShapeDtypeStruct`."""

    @property
    def dtype(self) -> np.dtype: ...


@runtime_checkable
class Tensor(Described, Protocol):
    """An array, or a tensor that `np.asarray` reads."""

    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class FileTensor(Tensor, Protocol):
    """A tensor in a file, as it is stored or dequantized on access."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Path: ...

    @property
    def origin(self) -> str: ...


@runtime_checkable
class Deferred(Protocol):
    """A tensor whose values may be computed slice by slice."""

    def deferred(self) -> np.ndarray | ScaledArray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """The array `values * scale`, computed in float32 and rounded once to `dtype` on access.

    Axes move without computing a value, and a slice computes only its own values.

    Attributes:
      values: stored values of any float dtype.
      scale: float32, of no axes or of the shape of `values`.
      dtype: dtype of the result.
    """

    values: np.ndarray
    scale: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        return self.values.size * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.values)

    def _moved(self, move: Callable[[np.ndarray], np.ndarray]) -> ScaledArray:
        scale = move(self.scale) if self.scale.ndim else self.scale
        return dataclasses.replace(self, values=move(self.values), scale=scale)

    def __getitem__(self, index: Any) -> ScaledArray:
        return self._moved(lambda array: array[index])

    def transpose(self, *axes: Any) -> ScaledArray:
        return self._moved(lambda array: array.transpose(*axes))

    def reshape(self, *shape: Any) -> ScaledArray:
        return self._moved(lambda array: array.reshape(*shape))

    def computed(self, out: np.ndarray | None = None) -> np.ndarray:
        """Compute the values.

        Args:
          out: contiguous array for them, of the same shape and dtype; None allocates one.
        """
        out = np.empty(self.shape, self.dtype) if out is None else out
        if self.values.dtype.itemsize == 1 and not self.scale.ndim:
            _look_up(self.values, _values_of_bytes(self.values.dtype, self.scale, self.dtype), out)
            return out
        if self.values.dtype.itemsize == 1:
            values = np.empty(self.shape, np.float32)
            one = np.ones((), np.float32)
            _look_up(self.values, _values_of_bytes(self.values.dtype, one, values.dtype), values)
        else:
            values = self.values.astype(np.float32)
        values *= self.scale
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused
            out[...] = values.astype(self.dtype)
        return out

    def is_finite(self, computed: np.ndarray) -> bool:
        """Return whether no value is NaN or infinite.

        Stored bytes are examined where they decide it, since they are fewer than the computed ones.

        Args:
          computed: result of `computed`.
        """
        if self.values.dtype.itemsize > 1 or self.scale.ndim:
            return finite(computed)
        one = np.ones((), np.float32)
        stored = _values_of_bytes(self.values.dtype, one, np.dtype(np.float32))
        table = _values_of_bytes(self.values.dtype, self.scale, self.dtype).astype(np.float32)
        overflows = np.isfinite(stored) & ~np.isfinite(table)
        return finite(computed) if overflows.any() else finite(self.values)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.computed(), dtype=dtype)


def _values_of_bytes(kind: np.dtype, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the 256 values of an 8-bit float, times a scale in float32, rounded to a dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32) * scale
        return values.astype(dtype)


def _look_up(values: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write `table[values]` to the contiguous array `out`, two 8-bit values at a time."""
    codes = np.ascontiguousarray(values.view(np.uint8)).reshape(-1)
    width = table.dtype.itemsize
    target = out.reshape(-1).view(f"u{width}")
    single = table.view(target.dtype)
    even = codes.size // 2 * 2
    if even < 1 << 16:  # a table of pairs would be larger than the values
        target[:] = single[codes]
        return
    code = np.arange(1 << 16)
    pair = np.stack([single[code & 255], single[code >> 8]], axis=1).view(f"u{2 * width}")[:, 0]
    pairs, targets = codes[:even].view(np.uint16), target[:even].view(pair.dtype)
    index = np.empty(BLOCK // 8, np.intp)  # small enough for the processor's cache
    for start in range(0, len(pairs), len(index)):
        part = pairs[start : start + len(index)]
        index[: len(part)] = part
        np.take(pair, index[: len(part)], out=targets[start : start + len(part)], mode="clip")
    if even < codes.size:
        target[even] = single[codes[even]]


def deferred(tensor: Any) -> np.ndarray | ScaledArray:
    """Return an array, or a `ScaledArray` whose values are not computed yet."""
    return tensor.deferred() if isinstance(tensor, Deferred) else np.asarray(tensor)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; `np.asarray` maps it into memory, read only.

    Attributes:
      name: name in the file.
      shape: shape in the file.
      dtype: dtype in the file.
      file: path of the file.
      offset: bytes from the start of the file.
      strides: elements between neighbours on each axis; None for a row-major tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def origin(self) -> str:
        """File and name of the tensor, for messages."""
        return f"{self.file}: tensor {self.name}"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype or self.dtype)
        mapped: np.ndarray
        if self.strides is None:
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        else:
            bits = np.dtype(f"u{self.dtype.itemsize}")  # NumPy has no strides for some extensions
            flat = np.memmap(self.file, bits, "r", self.offset, (span(self.shape, self.strides),))
            bytes_apart = [step * bits.itemsize for step in self.strides]
            mapped = np.lib.stride_tricks.as_strided(flat, self.shape, bytes_apart, writeable=False)
            mapped = mapped.view(self.dtype)
        return np.asarray(mapped, dtype=dtype, copy=copy)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last of a non-empty strided tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def size(tensor: Described) -> int:
    """Return the bytes of a tensor or of anything with `shape` and `dtype`."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def iter_chunks(
    tensor: Any, check: bool = False, buffers: Iterator[np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """Yield the values of `tensor` in row-major order as contiguous chunks of some megabytes.

    The whole tensor is never copied.

    Args:
      tensor: a tensor or anything that `np.asarray` reads.
      check: whether to refuse NaN and infinite values.
      buffers: buffers of `CHUNK` bytes for chunks that must be copied.

    Raises:
      UserError: with `check`, a value is NaN or infinite.
    """
    array = deferred(tensor)
    array = array.reshape(1) if array.ndim == 0 else array
    per_row = max(1, array.nbytes // max(1, len(array)))
    rows = max(1, CHUNK // per_row)
    rows = rows if rows < TILE[0] else rows // TILE[0] * TILE[0]
    for start in range(0, len(array), rows):
        view = array[start : start + rows]
        if isinstance(view, ScaledArray):
            chunk = view.computed(_buffer(view, buffers))
            is_finite = not check or view.is_finite(chunk)
        else:
            chunk = view if view.flags.c_contiguous else _copied(view, buffers)
            is_finite = not check or finite(chunk)
        if not is_finite:
            raise UserError(f"{tensor.origin} holds NaN or infinite values; get the file again")
        yield chunk


def stream_to(
    tensors: Iterable[tuple[str, Tensor]],
    write: Callable[[memoryview], object],
    check: bool,
    written: Callable[[str, int], None],
) -> None:
    """Pass the bytes of the tensors to `write`, chunk by chunk.

    `write` runs in a thread while the next chunk is prepared.

    Args:
      tensors: (name, tensor) pairs.
      write: writes the bytes.
      check: as in `iter_chunks`.
      written: called with the name and the number of bytes of each chunk.
    """
    with _STREAMING, concurrent.futures.ThreadPoolExecutor(1) as writer:
        buffers = itertools.cycle(_buffers())  # one is written while the other is filled
        pending: concurrent.futures.Future | None = None
        for name, tensor in tensors:
            for chunk in iter_chunks(tensor, check, buffers):
                if pending is not None:
                    pending.result()
                pending = writer.submit(write, chunk.reshape(-1).view(np.uint8).data)
                written(name, chunk.nbytes)
        if pending is not None:
            pending.result()


_STREAMING = threading.Lock()  # the buffers serve one file at a time


@functools.cache
def _buffers() -> tuple[np.ndarray, np.ndarray]:
    """Allocate two buffers once: new memory for every chunk would take longer than the copy."""
    return np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)


def _buffer(view: np.ndarray | ScaledArray, buffers: Iterator[np.ndarray] | None) -> np.ndarray:
    """Return memory for the values of `view`: the next buffer if they fit."""
    if buffers is None or view.nbytes > CHUNK:
        return np.empty(view.shape, view.dtype)
    return next(buffers)[: view.nbytes].view(view.dtype).reshape(view.shape)


def _copied(view: np.ndarray, buffers: Iterator[np.ndarray] | None) -> np.ndarray:
    """Copy `view` to contiguous memory, in the next buffer if it fits; matrices tile by tile."""
    copied = _buffer(view, buffers)
    if view.ndim != 2:
        copied[...] = view
        return copied
    # As integers, because NumPy copies extension dtypes element by element.
    bits = np.dtype(f"u{view.dtype.itemsize}")
    source, target = view.view(bits), copied.view(bits)
    for row, column in itertools.product(
        range(0, view.shape[0], TILE[0]), range(0, view.shape[1], TILE[1])
    ):
        tile = np.s_[row : row + TILE[0], column : column + TILE[1]]
        target[tile] = source[tile]
    return copied


def blank(tensor: Tensor) -> bool:
    """Return whether a tensor holds only zeros; reading stops at the first other value."""
    array = deferred(tensor)
    if isinstance(array, ScaledArray):
        if not array.scale.any():
            return True
        bits = array.values.itemsize * 8
        array = array.values.view(f"u{bits // 8}")
        without_sign = array.dtype.type((1 << (bits - 1)) - 1)
    else:
        without_sign = None
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()
    parts = (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))
    return not any((part if without_sign is None else part & without_sign).any() for part in parts)


def finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite; True for dtypes other than floats."""
    mask = EXPONENTS.get(values.dtype)
    if mask is None or not values.size:
        return True
    flat = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    return all(
        int((flat[start : start + BLOCK] & flat.dtype.type(mask)).max()) != mask
        for start in range(0, len(flat), BLOCK)
    )
