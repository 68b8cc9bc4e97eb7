"""safetensors files, read lazily and written whole: one file, a sharded index, or a folder that holds either.

Format (huggingface/safetensors): 8 bytes little endian n, n bytes of JSON {name: {dtype, shape, data_offsets}}, the data.
Sizes are checked against the file before anything is read, values keep their dtype (bfloat16 through ml_dtypes), and a file
appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_idgrpo.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
INDEX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; `np.asarray` maps it into memory, read only."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int  # bytes from the start of the file

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype or self.dtype)
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape), dtype=dtype, copy=copy)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or is not one."""
    path = Path(path)
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold a JSON object, holds {type(values).__name__}; get the file again")
    return values


def open_file(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(tensors by name, metadata) of one .safetensors file. UserError when the header and the file disagree."""
    path = Path(path)

    def broken(what: str) -> UserError:
        return UserError(f"{path}: {what}; the file is truncated or damaged, get it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise broken(f"no safetensors header in its {size} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        tensors: dict[str, LazyTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            if min((*shape, begin)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise broken(f"tensor {name} of shape {list(shape)} has {end - begin} bytes")
            if start + end > size:
                raise broken(f"tensor {name} ends at byte {start + end} of {size}")
            spans.append((begin, end, name))
            tensors[name] = LazyTensor(name, shape, dtype, path, start + begin)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(f"its header is not safetensors ({type(error).__name__}: {error})") from error
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise broken(f"tensor {name} starts at byte {begin} of the data instead of {reached}")
        reached = end
    if start + reached != size:
        raise broken(f"its {size} bytes are not the {start + reached} of its header")
    return tensors, metadata


def open_index(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a sharded checkpoint by its `*.safetensors.index.json`; shards lie beside it and nowhere else."""
    path = Path(path)
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path}: has no weight_map from tensor names to files; get the file again")
    shards = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(
                f"{path}: names the shard {file!r}, which is not a file beside it; do not trust this checkpoint"
            )
        shards[file], _ = open_file(path.parent / file)
    for name, file in files.items():
        if name not in shards[file]:
            raise UserError(f"{path}: tensor {name} is not in {file}; get both files again")
    for file, tensors in shards.items():
        if extra := sorted(name for name in tensors if files.get(name) != file):
            raise UserError(f"{path}: does not list tensor {extra[0]} of {file}; get both files again")
    return {name: shards[file][name] for name, file in files.items()}


def weights_file(path: str | Path) -> Path:
    """The one safetensors file or index that `path` is or, as a folder, holds."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; give a safetensors file or the folder that holds it")
    indices = sorted(path.glob(f"*{INDEX}"))
    files = indices or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = "none" if not files else ", ".join(file.name for file in files)
        raise UserError(f"{path}: should hold one safetensors file or one {INDEX[1:]}, holds {found}; name the file")
    return files[0]


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, of an index, or of the folder that holds one; nothing is read but headers."""
    file = weights_file(path)
    return open_index(file) if file.name.endswith(INDEX) else open_file(file)[0]


@contextlib.contextmanager
def aside(path: str | Path, marker: str | None = None) -> Iterator[Path]:
    """A place beside `path` to write a file or folder, which takes the name `path` when the block ends without an error.

    marker: a file that every folder of this kind holds; a folder is replaced only when it is empty or holds the marker, so
    that nobody's other files go. What the process leaves when it is killed never has the name `path`. UserError when the
    folder holds something else or nothing can be written.
    """
    path = Path(path)
    try:
        if path.is_dir() and any(path.iterdir()) and not (marker and (path / marker).exists()):
            raise UserError(f"{path}: holds something else (no {marker or 'file'} to replace); choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    new, old = work / "new", work / "old"
    try:
        yield new
        if path.is_dir():
            path.rename(old)  # a folder cannot be replaced in one call
        new.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another place") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)  # interrupted between the two renames
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """A JSON object, indented and with sorted keys, written aside and renamed."""
    with aside(path) as new:
        new.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


def write_file(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """One .safetensors file, tensor by tensor, with the metadata `format: pt` that transformers asks for.

    tensors: name -> array or anything `np.asarray` reads, with `shape` and `dtype`; each is read once, dtypes are kept.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))  # keeps data aligned
    end = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), list(tensors[name].shape)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with aside(path) as new, new.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            np.ascontiguousarray(np.asarray(tensors[name])).tofile(file)
        file.flush()
        os.fsync(file.fileno())
