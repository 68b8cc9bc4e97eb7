"""A tensor that is still in its file: name, shape and dtype are known, values are mapped into memory when they are asked for.

`np.asarray` of one is a read-only view of the file, so that a slice of it reads that slice alone.
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
from typing import Any

import ml_dtypes
import numpy as np

from jax_idgrpo.errors import UserError

CHUNK = 1 << 25  # bytes that are copied at a time
BLOCK = 1 << 18  # values that are looked at together
TILE = (256, 64)  # rows and columns of a transposed copy that stay in the processor's cache

EXPONENTS = {  # bits of a float that are all set in NaN and the infinities, and in nothing else
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; `np.asarray` maps it into memory, read only.

    strides: elements between neighbours on each axis, for tensors that are not row-major in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None

    @property
    def origin(self) -> str:
        """Where it comes from, for complaints."""
        return f"{self.file}: tensor {self.name}"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
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
    """Elements from the first to the last of a strided tensor that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def size(tensor: Any) -> int:
    """Bytes of a tensor of a file, or of anything with `shape` and `dtype`."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def iter_chunks(
    tensor: Any, check: bool = False, buffers: Iterator[np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """The values of `tensor` in row-major order as contiguous chunks of some megabytes; the whole is never copied.

    check: raise UserError that names the tensor's origin at NaN and infinite values.
    buffers: of `CHUNK` bytes; a copy that is needed takes the next one.
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
    tensors: Iterable[tuple[str, Any]],
    write: Callable[[memoryview], Any],
    check: bool,
    written: Callable[[str, int], None],
) -> None:
    """Hand the bytes of the tensors to `write`, chunk by chunk, in a thread of its own: the next chunk is made meanwhile.

    written(name, bytes) is called for each; check is as in `iter_chunks`.
    """
    with _STREAMING, concurrent.futures.ThreadPoolExecutor(1) as writer:
        buffers = itertools.cycle(_buffers())  # one is being written, the other filled
        pending: concurrent.futures.Future | None = None
        for name, tensor in tensors:
            for chunk in iter_chunks(tensor, check, buffers):
                if pending is not None:
                    pending.result()
                pending = writer.submit(write, chunk.reshape(-1).view(np.uint8).data)
                written(name, chunk.nbytes)
        if pending is not None:
            pending.result()


_STREAMING = threading.Lock()  # the buffers are for one file at a time


@functools.cache
def _buffers() -> tuple[np.ndarray, np.ndarray]:
    """Kept, since new memory for every chunk would take longer than the copy."""
    return np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)


def _copied(view: np.ndarray, buffers: Iterator[np.ndarray] | None) -> np.ndarray:
    """A contiguous copy of `view`, in the next buffer if it fits; matrices are copied tile by tile."""
    if buffers is None or view.nbytes > CHUNK:
        copied = np.empty(view.shape, view.dtype)
    else:
        copied = next(buffers)[: view.nbytes].view(view.dtype).reshape(view.shape)
    if view.ndim != 2:
        copied[...] = view
        return copied
    bits = np.dtype(f"u{view.dtype.itemsize}")
    source, target = (
        view.view(bits),
        copied.view(bits),
    )  # extension dtypes are copied element by element
    for row, column in itertools.product(
        range(0, view.shape[0], TILE[0]), range(0, view.shape[1], TILE[1])
    ):
        tile = np.s_[row : row + TILE[0], column : column + TILE[1]]
        target[tile] = source[tile]
    return copied


def blank(tensor: Any) -> bool:
    """Whether a tensor holds nothing but zeros; reading ends at the first other value."""
    array = np.asarray(tensor)
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()
    return not any(flat[start : start + BLOCK].any() for start in range(0, flat.size, BLOCK))


def finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; what is no float is finite."""
    mask = EXPONENTS.get(values.dtype)
    if mask is None or not values.size:
        return True
    flat = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    return all(
        int((flat[start : start + BLOCK] & flat.dtype.type(mask)).max()) != mask
        for start in range(0, len(flat), BLOCK)
    )
