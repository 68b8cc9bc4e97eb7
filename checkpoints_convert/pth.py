"""Read PyTorch's `.pth` files without running anything in them, and write them without PyTorch.

A file of `torch.save` is a zip archive of uncompressed entries: `NAME/data.pkl`, a pickle of the
mapping from names to tensors, and `NAME/data/KEY`, the bytes of each storage. Before PyTorch 1.6 it
was a sequence of pickles followed by the storages. A pickle is a program: the reader lets it build
strings, numbers, tuples, lists, dictionaries and descriptions of tensors, and refuses every other
name in it. Descriptions are checked against the file before they become tensors.
Source: PyTorch `torch/serialization.py`, `torch/_utils.py`.
"""

from __future__ import annotations

import collections
import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from checkpoints_convert.lazy import LazyTensor, Tensor, row_major, size, span, stream_to
from jax_idgrpo.errors import UserError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
UNTYPED = {  # names of dtypes without a storage class, and of their storage
    ("torch.storage", "UntypedStorage"): np.uint8,
    ("torch", "float8_e4m3fn"): ml_dtypes.float8_e4m3fn,
    ("torch", "float8_e5m2"): ml_dtypes.float8_e5m2,
}
NAMES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
PICKLE_LIMIT = 100_000_000  # bytes; the pickle of a thousand tensors has some hundred thousand
ENTRY_DEPTH = 3  # of mappings inside mappings
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PICKLES = 3  # magic number, protocol, machine; then the mapping and the list of storages
ALIGNMENT = 64  # bytes, of every storage in the file, as PyTorch writes it
ZIP_MAGIC = b"PK\x03\x04"
ENTRY = struct.Struct("<4s5H3L2H")  # local header of a zip entry
FAULTS = (  # exceptions that parsing a damaged pickle may raise
    pickle.UnpicklingError,
    EOFError,
    MemoryError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class _Refused(Exception):
    """A name in a pickle that no weights need."""


class _Unread(Exception):
    """A kind of tensor that is harmless but unsupported."""


Data = TypeVar("Data")


class _Type:
    """A storage class of torch, with the dtype of its elements."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage:
    def __init__(self, dtype: np.dtype, key: object, count: object):
        self.dtype, self.key, self.count = dtype, key, count


class _Tensor:
    """A tensor's description in a pickle, unchecked."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _RebuildTensor:
    """Replacement of torch's function. It has no attributes, so no pickle can change it."""

    __slots__ = ()

    def __call__(
        self, storage: object, offset: object, shape: object, strides: object, *_: object
    ) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _RebuildTypedTensor:
    """Replacement of torch's function for dtypes without a storage class, as `_RebuildTensor`."""

    __slots__ = ()

    def __call__(
        self,
        storage: object,
        offset: object,
        shape: object,
        strides: object,
        requires_grad: object,
        hooks: object,
        dtype: object,
        *_: object,
    ) -> _Tensor:
        if type(storage) is not _Storage or type(dtype) is not _Type:
            raise TypeError("a tensor without storage or dtype")
        return _Tensor(_Storage(dtype.dtype, storage.key, None), offset, shape, strides)


class _RebuildParameter:
    """Replacement of torch's function, as `_RebuildTensor`."""

    __slots__ = ()

    def __call__(self, data: Data, *_: object) -> Data:
        return data


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildTypedTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch", "Size"): tuple,
}

UNREAD = {("torch._utils", name) for name in ("_rebuild_qtensor", "_rebuild_sparse_tensor")}


class _Unpickler(pickle.Unpickler):
    """A pickle machine that accepts only the storages and the names of `ALLOWED`.

    The accepted names do nothing but hold their arguments.
    """

    def find_class(self, module: str, name: str) -> Any:
        # A new object each time, since a pickle can set its attributes.
        if module == "torch" and name in STORAGES:
            return _Type(np.dtype(STORAGES[name]))
        if (module, name) in UNTYPED:
            return _Type(np.dtype(UNTYPED[module, name]))
        if (module, name) in UNREAD or (module == "torch" and name.startswith("float8_")):
            raise _Unread(f"{module}.{name}")
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] != "storage"
            or not isinstance(pid[1], _Type)
        ):
            raise _Refused(f"the object {str(pid)[:60]!r}")
        return _Storage(pid[1].dtype, pid[2], pid[4])


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert errors of parsing a file to UserErrors that name the file."""
    try:
        yield
    except _Refused as error:
        raise UserError(
            f"{path}: its pickle asks for {error}, which no weights need; nothing of it was run, "
            "do not trust this file"
        ) from error
    except _Unread as error:
        what = f"holds quantised or otherwise unusual tensors ({error}), which are not read"
        raise UserError(
            f"{path}: {what}; get the bfloat16, float16 or float32 file of this model"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{path}: is no complete archive of torch.save ({error}); get the file again"
        ) from error
    except FAULTS as error:
        raise UserError(
            f"{path}: holds no readable pickle of tensors ({type(error).__name__}: {error}); get "
            "the file again"
        ) from error


def is_pth(start: bytes) -> bool:
    """Return whether a file with these first nine bytes may be one of `torch.save`.

    Such a file is a zip archive or a pickle of protocol 2 or later. safetensors starts with an
    arbitrary number, which may look like either, and continues with a brace.
    """
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return (start.startswith(ZIP_MAGIC) or pickled) and start[8:9] != b"{"


def open_file(path: Path, entry: str = "") -> dict[str, LazyTensor]:
    """Open the tensors of a `.pth` file by name; only the pickle is read.

    Args:
      path: the file.
      entry: one of `entries`, or "" for the mapping of the whole file.

    Raises:
      UserError: the file holds anything but plain weights there.
    """
    with _naming(path), path.open("rb") as file:
        values, places = _open(path, file)
        return _tensors(path, _mappings(values)[entry] if entry else values, places)


def entries(path: Path) -> dict[str, list[str]]:
    """List the mappings of tensors inside a training checkpoint.

    Returns:
      Keys on the way, joined by dots -> names of tensors. Empty if the file is one mapping from
      names to tensors, or holds none.
    """
    with _naming(path), path.open("rb") as file:
        values, _ = _open(path, file)
        return {
            entry: [name for name, tensor in dict.items(mapping) if type(tensor) is _Tensor]
            for entry, mapping in _mappings(values).items()
        }


def _open(path: Path, file: BinaryIO) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """Read the pickle of a file, as `_open_archive`."""
    archive = file.read(4) == ZIP_MAGIC
    file.seek(0)
    return _open_archive(path, file) if archive else _open_legacy(path, file)


def _mappings(values: object) -> dict[str, dict]:
    """Find the mappings with tensors inside a mapping without; each is visited once."""
    found: dict[str, dict] = {}
    visited: set[int] = set()

    def visit(mapping: dict, entry: str, depth: int) -> None:
        if id(mapping) in visited or depth > ENTRY_DEPTH:
            return
        visited.add(id(mapping))
        if any(type(value) is _Tensor for value in dict.values(mapping)):
            found[entry] = mapping
            return
        for key, value in dict.items(mapping):
            if isinstance(key, str) and isinstance(value, dict):
                visit(value, f"{entry}.{key}" if entry else key, depth + 1)

    if isinstance(values, dict):
        visit(values, "", 0)
    return found if "" not in found else {}


def _open_archive(path: Path, file: BinaryIO) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """Read the pickle of an archive.

    Returns:
      The content of the pickle, and a function from a storage's key to its (offset in the file,
      bytes).
    """
    total = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(
                f"{path}: is a ZIP archive and no file of torch.save (it has no data.pkl); give a "
                "file of weights"
            )
        root = pickles[0].removesuffix("data.pkl")
        order = (
            archive.read(entries[f"{root}byteorder"])
            if f"{root}byteorder" in entries
            else b"little"
        )
        if order != b"little":
            raise UserError(
                f"{path}: its numbers are {order[:10]!r} endian; save it again on a little-endian "
                "machine"
            )
        if entries[pickles[0]].file_size > min(PICKLE_LIMIT, total):
            raise UserError(
                f"{path}: its data.pkl claims {entries[pickles[0]].file_size} bytes; do not trust "
                "this file"
            )
        values = _Unpickler(io.BytesIO(archive.read(pickles[0])), encoding="utf-8").load()

    def place(key: str) -> tuple[int, int]:
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise UserError(f"{path}: has no entry data/{key}; the file is damaged, get it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UserError(
                f"{path}: entry data/{key} is compressed, which torch.save never does; get the "
                "file again"
            )
        with path.open("rb") as header:
            header.seek(entry.header_offset)
            magic, *_, name, extra = ENTRY.unpack(header.read(ENTRY.size))
        if magic != ZIP_MAGIC:
            raise UserError(
                f"{path}: entry data/{key} has no header; the file is damaged, get it again"
            )
        return entry.header_offset + ENTRY.size + name + extra, entry.file_size

    return values, place


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """Read the pickle of a file older than PyTorch 1.6, as `_open_archive`."""
    storages: dict[str, _Storage] = {}

    class Remembering(_Unpickler):
        def persistent_load(self, pid: Any) -> _Storage:
            storage = super().persistent_load(pid)
            if len(pid) > 5 and pid[5] is not None:
                raise _Refused("a view into a storage")
            return storages.setdefault(str(storage.key), storage)

    if Remembering(file, encoding="utf-8").load() != LEGACY_MAGIC:
        raise UserError(f"{path}: is a pickle, but not one of torch.save; give a file of weights")
    for _ in range(LEGACY_PICKLES - 1):
        Remembering(file, encoding="utf-8").load()
    values = Remembering(file, encoding="utf-8").load()
    keys = Remembering(file, encoding="utf-8").load()
    places: dict[str, tuple[int, int]] = {}
    at = file.tell()
    for key in keys:
        file.seek(at)
        count = int.from_bytes(file.read(8), "little", signed=True)
        bytes_of = count * storages[key].dtype.itemsize
        places[key] = (at + 8, bytes_of)
        at += 8 + bytes_of
        if count < 0 or at > path.stat().st_size:
            raise UserError(
                f"{path}: storage {key} of {bytes_of} bytes is incomplete; the file is truncated, "
                "get it again"
            )
    return values, lambda key: places[key]


def _tensors(
    path: Path, values: object, place: Callable[[str], tuple[int, int]]
) -> dict[str, LazyTensor]:
    """Check each description of the pickle against its storage and the file.

    Args:
      path: the file.
      values: content of the pickle.
      place: maps a storage's key to its (offset in the file, bytes).
    """
    total = path.stat().st_size
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: holds a {type(values).__name__}, not a mapping from names to tensors; give a "
            "file of weights"
        )
    tensors: dict[str, LazyTensor] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, tensor in dict.items(values):  # a pickle can set attributes of `values`
        if not isinstance(name, str) or type(tensor) is not _Tensor:
            kind = type(tensor).__name__.lstrip("_")
            raise UserError(
                f"{path}: its entry {str(name)[:60]!r} is a {kind}, not a tensor; save only the "
                "weights"
            )
        storage, shape, strides, offset = (
            tensor.storage,
            tensor.shape,
            tensor.strides,
            tensor.offset,
        )
        numbers = (
            (*shape, *strides, offset)
            if isinstance(shape, tuple) and isinstance(strides, tuple)
            else (None,)
        )
        if (
            type(storage) is not _Storage
            or not isinstance(storage.key, str)
            or not isinstance(storage.dtype, np.dtype)
            or len(shape) != len(strides)
            or any(type(number) is not int or number < 0 for number in numbers)
        ):
            raise UserError(
                f"{path}: tensor {name} is not described by plain numbers; do not trust this file"
            )
        if storage.key not in places:
            places[storage.key] = place(storage.key)
        start, available = places[storage.key]
        begin, width = start + offset * storage.dtype.itemsize, storage.dtype.itemsize
        end = begin + (span(shape, strides) * width if math.prod(shape) else 0)
        if end > min(start + available, total):
            raise UserError(
                f"{path}: tensor {name} of shape {list(shape)} ends at byte {end} of "
                f"{min(start + available, total)}; the file is truncated or damaged, get it again"
            )
        contiguous = all(
            size == 1 or a == b for size, a, b in zip(shape, strides, row_major(shape), strict=True)
        )
        tensors[name] = LazyTensor(
            name, shape, storage.dtype, path, begin, None if contiguous else strides
        )
    return tensors


# ---- writing -------------------------------------------------------------------------------------


def write(
    file: BinaryIO,
    root: str,
    tensors: Mapping[str, Tensor],
    written: Callable[[str, int], None],
    check: bool = False,
) -> None:
    """Write a file as `torch.save({name: tensor})` does, each tensor contiguous in its own storage.

    Args:
      file: the seekable file.
      root: name of the archive inside the file, of letters and digits.
      tensors: tensors by name.
      written: called with the name and the number of bytes of each written chunk.
      check: whether to refuse NaN and infinite values, as in `lazy.iter_chunks`.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, text in (
            ("data.pkl", _pickle(tensors)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            with _entry(archive, file, f"{root}/{name}", len(text)) as target:
                target.write(text)
        for index, (name, tensor) in enumerate(tensors.items()):
            with _entry(archive, file, f"{root}/data/{index}", size(tensor)) as target:
                stream_to([(name, tensor)], target.write, check, written)


def _entry(archive: zipfile.ZipFile, file: BinaryIO, name: str, count: int) -> Any:
    """Open an uncompressed entry for writing, whose data starts at a multiple of `ALIGNMENT`.

    Args:
      archive: the archive.
      file: file of the archive.
      name: name of the entry.
      count: bytes of the entry.
    """
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    large = count >= zipfile.ZIP64_LIMIT // 2
    start = file.tell() + ENTRY.size + len(name.encode()) + (20 if large else 0) + 4
    padding = -start % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return archive.open(entry, "w", force_zip64=large)


def _pickle(tensors: Mapping[str, Tensor]) -> bytes:
    """Pickle the mapping with protocol 2, without the memos with which `torch.save` saves space."""

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        if value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    parts = [b"\x80\x02}("]
    for index, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(int(length) for length in tensor.shape)
        storage = b"(" + text("storage") + f"ctorch\n{NAMES[np.dtype(tensor.dtype)]}\n".encode()
        storage += text(str(index)) + text("cpu") + number(math.prod(shape)) + b"tQ"
        parts.append(
            text(name)
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + number(0)
            + numbers(shape)
        )
        parts.append(numbers(row_major(shape)) + b"\x89ccollections\nOrderedDict\n)RtR")
    return b"".join([*parts, b"u."])
