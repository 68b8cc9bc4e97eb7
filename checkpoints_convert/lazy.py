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

EXPONENTS = {  # bits of a float that are all set only in NaN and the infinities
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
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
            flat = np.memmap(
                self.file, self.dtype, "r", self.offset, (span(self.shape, self.strides),)
            )
            bytes_apart = [step * self.dtype.itemsize for step in self.strides]
            mapped = np.lib.stride_tricks.as_strided(flat, self.shape, bytes_apart, writeable=False)
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
    array = np.asarray(tensor)
    array = array.reshape(1) if array.ndim == 0 else array
    per_row = max(1, array.nbytes // max(1, len(array)))
    rows = max(1, CHUNK // per_row)
    rows = rows if rows < TILE[0] else rows // TILE[0] * TILE[0]
    for start in range(0, len(array), rows):
        view = array[start : start + rows]
        chunk = view if view.flags.c_contiguous else _copied(view, buffers)
        if check and not finite(chunk):
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


def _copied(view: np.ndarray, buffers: Iterator[np.ndarray] | None) -> np.ndarray:
    """Copy `view` to contiguous memory, in the next buffer if it fits; matrices tile by tile."""
    if buffers is None or view.nbytes > CHUNK:
        copied = np.empty(view.shape, view.dtype)
    else:
        copied = next(buffers)[: view.nbytes].view(view.dtype).reshape(view.shape)
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
    array = np.asarray(tensor)
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()
    return not any(flat[start : start + BLOCK].any() for start in range(0, flat.size, BLOCK))


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
