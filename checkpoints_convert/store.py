"""Read files of tensors lazily and write them atomically.

A source is one file, a sharded index, or a folder that holds either. The first bytes distinguish
safetensors (huggingface/safetensors: 8 bytes little endian n, n bytes of JSON {name: {dtype, shape,
data_offsets}}, the data) from files of `torch.save`, which `pth` reads. Sizes are checked against
the file before any value is read. Values keep their dtype (bfloat16 through ml_dtypes). A file
appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from checkpoints_convert import file_types, pth
from checkpoints_convert.lazy import Described, LazyTensor, Tensor, size, stream_to
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
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UNREAD_DTYPES = {"F8": "mxfp8", "F6": "fp6", "F4": "fp4", "C64": "complex"}  # before the first "_"
UNREAD_DTYPES |= dict.fromkeys(("U16", "U32", "U64"), "unsigned")
LARGEST = 1 << 40  # of one axis; an empty tensor may claim any
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
INDEX = ".index.json"  # suffix of a list of shards
INDEX_NAME = r"\.index(\.[\w-]+)?\.json$"  # pattern of the same suffix, also of a variant
VARIANT = r"\.(fp|bf|f)\d+(?=[.-])|\.(non_)?ema(?=[.-])|-\d+-of-\d+(?=\.)"  # in names of files
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # of files that may hold tensors
# Suffixes of files without tensors.
TEXT_SUFFIXES = (".json", ".md", ".txt", ".py", ".yaml", ".yml", ".xml", ".html", ".csv")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      UserError: the file is missing or holds no JSON object.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        is_json = re.match(file_types.JSON, file_types.start_of(path))
        other = None if is_json else file_types.complaint(path)
        raise UserError(
            f"{path}: {other or f'is not JSON ({error}); get the file again'}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: should hold a JSON object, holds {type(values).__name__}; get the file again"
        )
    return values


def open_file(path: str | Path, entry: str = "") -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Open one file of safetensors or of `torch.save`.

    Args:
      path: the file.
      entry: mapping inside a training checkpoint, as in `pth.entries`.

    Returns:
      (tensors by name, metadata).

    Raises:
      UserError: the file cannot be read, or its header and its size disagree.
    """
    path = Path(path)
    file_types.refuse_others(path)
    is_pth = pth.is_pth(file_types.start_of(path))
    return (pth.open_file(path, entry), {}) if is_pth else _open_safetensors(path)


def entries(path: Path) -> dict[str, list[str]]:
    """List the mappings of tensors inside a file, as in `pth.entries`; {} for another format."""
    if is_index(path):
        return {}
    file_types.refuse_others(path)
    return pth.entries(path) if pth.is_pth(file_types.start_of(path)) else {}


def _open_safetensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
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
            kind = UNREAD_DTYPES.get(entry["dtype"].partition("_")[0])
            if kind is not None and entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: its tensor {name} is {kind} ({entry['dtype']}), and {kind} weights "
                    "are not read; get the bfloat16, float16, float32 or fp8 file of this model"
                )
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            is_possible = min((*shape, begin)) >= 0 and max((*shape, 0)) < LARGEST
            if not is_possible or end - begin != math.prod(shape) * dtype.itemsize:
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
    """Open the tensors of a sharded checkpoint by its `*.index.json`.

    Raises:
      UserError: index and shards disagree, a shard is missing, or a shard is not beside the index.
    """
    path = Path(path)
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path}: has no weight_map from tensor names to files; get the file again")
    shards = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(
                f"{path}: names the shard {file!r}, which is not a file beside it; do not trust "
                "this checkpoint"
            )
        if not (path.parent / file).is_file():
            missing = [
                name for name in sorted(set(files.values())) if not (path.parent / name).is_file()
            ]
            raise UserError(
                f"{path}: its shard {', '.join(missing)} is not beside it; get what is missing"
            )
        shards[file], _ = open_file(path.parent / file)
    for name, file in files.items():
        if name not in shards[file]:
            raise UserError(f"{path}: tensor {name} is not in {file}; get both files again")
    for file, tensors in shards.items():
        if extra := sorted(name for name in tensors if files.get(name) != file):
            raise UserError(
                f"{path}: does not list tensor {extra[0]} of {file}; get both files again"
            )
    return {name: shards[file][name] for name, file in files.items()}


def weights_files(path: str | Path) -> list[Path]:
    """List the files of weights at `path`, a file or a folder; an index stands for its shards."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"{path}: does not exist; give a file of weights or the folder that holds it"
        )
    there = [file for file in visible(path.iterdir()) if file.is_file()]
    indices = [file for file in there if is_index(file)]
    shards: set[str] = set()
    for index in indices:
        weight_map = read_json(index).get("weight_map")
        shards |= (
            {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        )
    files = [file for file in there if file.suffix in SUFFIXES and file.name not in shards]
    return _preferred([*indices, *files])


def _preferred(files: list[Path]) -> list[Path]:
    """Drop files that repeat the weights of another, with the preferences of diffusers.

    `model.safetensors` has precedence over `model.fp16.safetensors`, `model.bin` and
    `pytorch_model.bin`. An index is treated as the file that its shards form.
    """
    names = {file.name.removesuffix(INDEX) for file in files}

    def is_second(file: Path) -> bool:
        name = re.sub(INDEX_NAME, "", file.name)
        plain = re.sub(VARIANT, "", name)
        is_variant = plain != name or (is_index(file) and not file.name.endswith(INDEX))
        twin = re.sub(r"^pytorch_model", "model", plain.removesuffix(".bin")) + ".safetensors"
        return (is_variant and plain in names) or (name.endswith(".bin") and twin in names)

    return [file for file in files if not is_second(file)]


def visible(paths: Iterable[Path]) -> list[Path]:
    """Sort the paths without hidden ones, such as the `._NAME` that macOS leaves on other disks."""
    return sorted(path for path in paths if not path.name.startswith("."))


def refuse_foreign(folder: str | Path) -> None:
    """Raise a UserError if a folder without readable weights holds weights in another format."""
    for file in visible(Path(folder).iterdir()):
        if file.is_file() and file.suffix not in TEXT_SUFFIXES:
            file_types.refuse_others(file)


def weights_file(path: str | Path) -> Path:
    """Return the one file of weights or index at `path`, a file or a folder.

    Raises:
      UserError: there is none, or more than one.
    """
    files = weights_files(path)
    if not files:
        refuse_foreign(path)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        remedy = "keep one of them there" if files else "get the whole folder"
        raise UserError(
            f"{path}: should hold one file of weights or one {INDEX[1:]}, holds {found}; {remedy}"
        )
    return files[0]


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Open the tensors of a file, an index, or the folder of one; only headers are read."""
    return open_weights(weights_file(path))[0]


def is_index(path: Path) -> bool:
    """Return whether a file is a list of shards, judged by its name."""
    return re.search(INDEX_NAME, path.name) is not None


def open_weights(file: Path, entry: str = "") -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Open (tensors by name, metadata) of a file or of the shards of an index.

    Args:
      file: the file or index.
      entry: as in `open_file`.
    """
    return (open_index(file), {}) if is_index(file) else open_file(file, entry)


@contextlib.contextmanager
def atomic_path(path: str | Path, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends without an error.

    A killed process never leaves a partial result at `path`.

    Args:
      path: the file or folder to write.
      marker: file that every folder of this kind holds. An existing folder is replaced only if it
        is empty or holds the marker, so other files of the user are safe.

    Raises:
      UserError: the folder holds something else, or `path` cannot be written.
    """
    path = Path(path)
    _refuse_others(path, marker)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    try:
        yield work / "new"
        _replace(work, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another place"
        ) from error
    finally:
        _restore(work, path)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def resumable(path: str | Path, marker: str, plan: Mapping[str, object]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path`, and that survives a killed process.

    The next process with the same plan gets the same folder with the finished files. The folder is
    removed when the block raises anything but KeyboardInterrupt.

    Args:
      path: the folder to write.
      marker: as in `atomic_path`.
      plan: description of the content as JSON; files of another plan are removed.

    Raises:
      UserError: as in `atomic_path`, or another process is writing `path`.
    """
    path = Path(path)
    _refuse_others(path, marker)
    work = path.absolute().with_name(f".{path.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{path}: another process is writing it; wait for it or choose another place"
            ) from error
        try:
            _restore(work, path)
            new, planned = work / "new", work / "plan.json"
            text = json.dumps(plan, sort_keys=True)
            if not (planned.is_file() and planned.read_text("utf-8") == text):
                shutil.rmtree(new, ignore_errors=True)
                planned.write_text(text, "utf-8")
            new.mkdir(exist_ok=True)
            # Hidden folders are temporary paths of `atomic_path` in the killed process.
            for folder, folders, _ in os.walk(new):
                for name in [name for name in folders if name.startswith(".")]:
                    shutil.rmtree(Path(folder) / name)
            yield new
            _replace(work, path)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _restore(work, path)
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                what = f"{path}: cannot be written ({error.strerror})"
                raise UserError(f"{what}; free space or choose another place") from error
            raise
        shutil.rmtree(work, ignore_errors=True)


def _refuse_others(path: Path, marker: str | None) -> None:
    try:
        if path.is_dir() and any(path.iterdir()) and not (marker and (path / marker).exists()):
            raise UserError(
                f"{path}: holds something else (no {marker or 'file'} to replace); choose another "
                "place"
            )
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error


def _replace(work: Path, path: Path) -> None:
    """Rename `work/new` to `path`, after an existing folder there to `work/old`."""
    if path.is_dir():
        path.rename(work / "old")
    (work / "new").replace(path)


def _restore(work: Path, path: Path) -> None:
    """Undo a `_replace` that was interrupted between its two renames."""
    if (work / "old").exists() and not path.exists():
        (work / "old").rename(path)


def require_space(folder: Path, sizes: Mapping[str, int], what: Path) -> None:
    """Check that there is space for all files before writing starts.

    Args:
      folder: a folder on the disk.
      sizes: bytes by file name.
      what: the destination, for the message.

    Raises:
      UserError: names the first file that would not fit.
    """
    free = shutil.disk_usage(folder).free
    for name, needed in zip(sizes, itertools.accumulate(sizes.values()), strict=True):
        if needed > free:
            total = f"{sum(sizes.values()):,} bytes"
            raise UserError(
                f"{what}: needs {total}, {free:,} are free, not enough for {name}; free space or "
                "choose another place"
            )


Written = TypeVar("Written", bound=Described)


def shards(tensors: Mapping[str, Written], limit: int) -> list[dict[str, Written]]:
    """Distribute the tensors, in their order, over files of at most `limit` bytes.

    A larger tensor gets a file of its own.
    """
    files: list[dict[str, Written]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + size(tensor) > limit:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += size(tensor)
    return files


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of `count` safetensors files, numbered as in all libraries."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def write_json(path: str | Path, values: Mapping[str, object]) -> None:
    """Write a JSON object atomically, indented and with sorted keys."""
    with atomic_path(path) as new:
        new.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


Progress = Callable[[str, int], None]  # called with the name of a tensor and the written bytes


def silent(name: str, count: int) -> None:
    """No-op progress callback."""


def write_file(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    written: Progress = silent,
    check: bool = False,
) -> None:
    """Write one file atomically, tensor by tensor.

    Args:
      path: the file; `*.pth` is written as `torch.save` does, any other name as safetensors.
      tensors: name -> array or anything that `np.asarray` reads, with `shape` and `dtype`. Each is
        read once and keeps its dtype.
      metadata: further metadata of safetensors, beside the `format: pt` that transformers requires.
      written: called with the name and the number of bytes of each written chunk.
      check: whether to refuse NaN and infinite values.

    Raises:
      UserError: the file cannot be written; the message names the last tensor.
    """
    path, now = Path(path), ""

    def report(name: str, count: int) -> None:
        nonlocal now
        now = name
        written(name, count)

    with atomic_path(path) as new, new.open("wb") as file:
        try:
            if path.suffix == ".pth":
                pth.write(file, path.stem, tensors, report, check)
            else:
                _write_safetensors(file, tensors, metadata or {}, report, check)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            what = f"{path}: cannot be written after tensor {now or next(iter(tensors), '')}"
            raise UserError(
                f"{what} ({error.strerror}); free space or choose another place"
            ) from error


def _write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    written: Progress,
    check: bool,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    # Descending sizes of elements keep the data aligned.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    end = 0
    for name in order:
        begin, end = end, end + size(tensors[name])
        dtype, shape = CODES[np.dtype(tensors[name].dtype)], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    stream_to(((name, tensors[name]) for name in order), file.write, check, written)
