"""Write checkpoints as the project's store, diffusers folders or original folders.

Tensors are copied chunk by chunk, bit for bit, with their dtype. A folder of weights is written
beside its destination and renamed when it is complete. After a kill, the next run with the same
destination continues with the finished files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from checkpoints_convert import experts, faces, rules, store, wan
from checkpoints_convert.card import FILE as CARD
from checkpoints_convert.checkpoint import (
    INDEX,
    SCHEDULER_CONFIG,
    STORE,
    STORE_VERSION,
    TOKENIZER_CONFIG,
    Checkpoint,
    default_shift,
)
from checkpoints_convert.identify import FACE, FAMILIES, TRANSFORMER
from checkpoints_convert.lazy import Tensor, size
from checkpoints_convert.lora_merge import Merge, merged
from checkpoints_convert.network import Network, ours, published, renamed
from jax_idgrpo.config.model_kinds import MODEL_KINDS
from jax_idgrpo.errors import UserError

GIGABYTE = 10**9
SHARD = 5 * GIGABYTE  # as in diffusers and transformers
ORIGINAL_SHARD = 10 * GIGABYTE  # as in the original repositories
STORE_STEM = "parameters"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
PIPELINE_CLASSES = dict.fromkeys(MODEL_KINDS, "WanPipeline") | {"vace": "WanVACEPipeline"}

# Called with (bytes in all, bytes done); yields a function to call with the progress.
ProgressBar = Callable[[int, int], AbstractContextManager[store.Progress]]


def no_bar(total: int, done: int) -> AbstractContextManager[store.Progress]:
    """Show no progress."""
    return nullcontext(store.silent)


@dataclasses.dataclass(frozen=True)
class Files:
    """A set of tensors and their files.

    Attributes:
      folder: folder inside the checkpoint; "" is the checkpoint itself.
      stem: stem of the names of safetensors files, or the name of one `.pth` file.
      tensors: tensors by name.
      limit: largest number of bytes of a safetensors file.
    """

    folder: str
    stem: str
    tensors: Mapping[str, Tensor]
    limit: int = SHARD

    def cut(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each file by its name."""
        if self.stem.endswith(".pth"):
            return {self.stem: dict(self.tensors)}
        parts = store.shards(self.tensors, self.limit)
        return dict(zip(store.shard_names(self.stem, len(parts)), parts, strict=True))


def write_store(
    checkpoint: Checkpoint,
    destination: Path,
    bar: ProgressBar = no_bar,
    merges: Sequence[Merge] = (),
) -> None:
    """Write the project's store of a pipeline or a single network.

    The store records the kind, the original config, and what was chosen, dequantized or merged.

    Args:
      checkpoint: the checkpoint.
      destination: folder to write.
      bar: progress bar.
      merges: LoRA files to merge into the transformer.

    Raises:
      UserError: a file does not fit the transformer.
    """
    alone = len(checkpoint.networks) == 1
    record: dict[str, Any] = {"kind": checkpoint.kind, "version": STORE_VERSION}
    if checkpoint.notes:
        record["notes"] = checkpoint.notes
    if merges:
        record["merged"] = [merge.described for merge in merges]
    files = []
    for part, network in checkpoint.networks.items():
        if network.original is not None:
            record[_original_field(part)] = network.original
        tensors = renamed(_parameters(network, merges), rules.stored(network.table), network.shapes)
        files.append(Files("" if alone else part, STORE_STEM, tensors))
    _write(
        checkpoint,
        destination,
        files,
        _diffusers_texts(checkpoint) | {STORE: record},
        "tokenizer",
        bar,
        merges,
    )


def _parameters(network: Network, merges: Sequence[Merge]) -> Mapping[str, Tensor]:
    """Return the parameters of a network by our names, for a transformer with the merged files."""
    own = ours(network)
    if not merges or network.part != TRANSFORMER:
        return own
    return {**own, **merged(network, own, merges)}


def write_diffusers(
    checkpoint: Checkpoint,
    destination: Path,
    card: str,
    bar: ProgressBar = no_bar,
    shard: int = SHARD,
    merges: Sequence[Merge] = (),
) -> None:
    """Write the diffusers folder of a pipeline or a single network.

    Args:
      checkpoint: the checkpoint.
      destination: folder to write.
      card: text of the model card.
      bar: progress bar.
      shard: largest number of bytes of a file.
      merges: LoRA files to merge into the transformer.

    Raises:
      UserError: a file does not fit the transformer, or a part of the pipeline is missing.
    """
    alone = len(checkpoint.networks) == 1
    files = []
    for part, network in checkpoint.networks.items():
        family = FAMILIES[network.part]
        tensors = renamed(
            _parameters(network, merges),
            family.table.rules(network.config, family.published),
            network.shapes,
        )
        files.append(Files("" if alone else part, family.weights, tensors, shard))
    texts = _diffusers_texts(checkpoint) | {CARD: card}
    _write(checkpoint, destination, files, texts, "tokenizer", bar, merges)


def write_original(
    checkpoint: Checkpoint,
    destination: Path,
    card: str,
    bar: ProgressBar = no_bar,
    shard: int = ORIGINAL_SHARD,
) -> None:
    """Write the folder of the original repositories, with their names of files.

    Args:
      checkpoint: the checkpoint.
      destination: folder to write.
      card: text of the model card.
      bar: progress bar.
      shard: largest number of bytes of a safetensors file.
    """
    files = []
    texts: dict[str, Any] = {CARD: card}
    for part, network in checkpoint.networks.items():
        if network.part == FACE:
            files.append(
                Files(
                    "",
                    faces.NETWORKS[network.values["architecture"]].file_name(network.config),
                    published(network),
                )
            )
            continue
        family = FAMILIES[network.part]
        tensors = renamed(
            ours(network), family.table.rules(network.config, "original"), network.shapes
        )
        name, folder = family.original, ""
        if network.part == TRANSFORMER:
            folder = experts.FOLDERS[part] if checkpoint.boundary is not None else ""
            texts[str(Path(folder, "config.json"))] = _original_config(checkpoint, part)
            if checkpoint.kind == "phantom":
                small = sum(map(size, tensors.values())) <= shard
                name = "Phantom-Wan-1.3B.pth" if small else "Phantom_Wan_14B.safetensors"
        files.append(Files(folder, name.removesuffix(".safetensors"), tensors, shard))
    _write(checkpoint, destination, files, texts, ORIGINAL_TOKENIZER, bar)


def _original_field(part: str) -> str:
    """Return the field of the store's record with the original config of a transformer."""
    return "original_config" + part.removeprefix(TRANSFORMER)


def _original_config(checkpoint: Checkpoint, part: str) -> Mapping[str, object]:
    """Return the config of the source if it describes the same network, otherwise a new one."""
    network = checkpoint.networks[part]
    found = network.original
    if found is None and (checkpoint.path / STORE).is_file():
        found = store.read_json(checkpoint.path / STORE).get(_original_field(part))
    made = wan.config_to_original(network.config)
    sizes = ("dim", "eps", "num_heads", "num_layers", "vace_layers")
    return (
        made if found is None or any(found.get(name) != made.get(name) for name in sizes) else found
    )


def _diffusers_texts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Make the small files of the diffusers layout by their paths: configs, index, scheduler."""
    networks = checkpoint.networks
    if len(networks) == 1:
        return {"config.json": dict(next(iter(networks.values())).values)}
    if missing := checkpoint.missing():
        raise UserError(
            f"{checkpoint.path}: has no {', '.join(missing)}; give the folder that has them with "
            "--with, or only one network's file"
        )
    texts: dict[str, Any] = {
        f"{part}/config.json": dict(network.values) for part, network in networks.items()
    }
    assert checkpoint.kind is not None
    if checkpoint.scheduler is None:
        texts[f"scheduler/{SCHEDULER_CONFIG}"] = wan.scheduler_to_json(default_shift(checkpoint))
    else:
        texts[f"scheduler/{SCHEDULER_CONFIG}"] = store.read_json(
            checkpoint.scheduler / SCHEDULER_CONFIG
        )
    if (checkpoint.path / INDEX).is_file():
        texts[INDEX] = store.read_json(checkpoint.path / INDEX)
        return texts
    if checkpoint.tokenizer is None:
        config = json.loads(checkpoint.tokenizer_texts[TOKENIZER_CONFIG])
    else:
        config = store.read_json(checkpoint.tokenizer / TOKENIZER_CONFIG)
    tokenizer = config.get("tokenizer_class", "T5TokenizerFast")
    texts[INDEX] = {
        "_class_name": PIPELINE_CLASSES[checkpoint.kind],
        "_diffusers_version": wan.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", texts[f"scheduler/{SCHEDULER_CONFIG}"]["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", texts[f"{TRANSFORMER}/config.json"]["_class_name"]],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if checkpoint.boundary is not None:
        texts[INDEX] |= {
            "boundary_ratio": checkpoint.boundary,
            experts.SECOND: texts[INDEX][TRANSFORMER],
        }
    return texts


def _write(
    checkpoint: Checkpoint,
    destination: Path,
    sets: list[Files],
    texts: dict[str, Any],
    tokenizer: str,
    bar: ProgressBar,
    besides: Sequence[Merge] = (),
) -> None:
    """Write all files of a folder, which appears complete or not at all.

    Args:
      checkpoint: source of the tensors.
      destination: folder to write.
      sets: tensors and their files.
      texts: path in the folder -> JSON object or text.
      tokenizer: folder of the tokenizer.
      bar: progress bar.
      besides: further sources of the tensors.
    """
    files: dict[str, dict[str, Tensor]] = {}
    # A marker is a name that only checkpoints have: config.json and README.md are in many folders.
    markers = [INDEX] if INDEX in texts else []
    for part in sets:
        cut = {str(Path(part.folder, name)): tensors for name, tensors in part.cut().items()}
        files |= cut
        if len(cut) > 1:
            total = sum(size(tensor) for tensors in cut.values() for tensor in tensors.values())
            places = {name: Path(file).name for file, tensors in cut.items() for name in tensors}
            index = f"{part.stem}.safetensors{store.INDEX}"
            texts[str(Path(part.folder, index))] = {
                "metadata": {"total_size": total},
                "weight_map": places,
            }
            markers.append(str(Path(part.folder, index)))
        markers += cut
    sizes = {name: sum(map(size, tensors.values())) for name, tensors in files.items()}
    with store.resumable(
        destination,
        markers[0],
        {"files": sizes, "sources": _sources(checkpoint, besides)},
    ) as new:
        done = {name: sizes[name] for name in files if (new / name).is_file()}
        store.require_space(
            new, {name: count for name, count in sizes.items() if name not in done}, destination
        )
        for name, content in texts.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                (new / name).write_text(content, "utf-8")
            elif (same := _same_in_source(checkpoint, name, content)) is not None:
                shutil.copyfile(same, new / name)
            else:
                store.write_json(new / name, content)
        if checkpoint.tokenizer is not None:
            shutil.copytree(
                checkpoint.tokenizer,
                new / tokenizer,
                copy_function=shutil.copyfile,
                dirs_exist_ok=True,
            )
        else:
            for name, text in checkpoint.tokenizer_texts.items():
                (new / tokenizer).mkdir(parents=True, exist_ok=True)
                (new / tokenizer / name).write_text(text, "utf-8")
        with bar(sum(sizes.values()), sum(done.values())) as written:
            for name, tensors in files.items():
                if name not in done:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    store.write_file(new / name, tensors, written=written, check=True)


def _same_in_source(
    checkpoint: Checkpoint, name: str, content: Mapping[str, object]
) -> Path | None:
    """Find the file of the source with the same path and content, to copy it byte for byte."""
    path = checkpoint.path / name
    return path if path.is_file() and store.read_json(path) == content else None


def _sources(checkpoint: Checkpoint, merges: Sequence[Merge]) -> dict[str, Any]:
    """Describe the sources, which must be the same when writing is resumed.

    They are the size and time of every file, the scales of merged files, and the tensors that are
    read.
    """
    tensors = [
        tensor for network in checkpoint.networks.values() for tensor in network.tensors.values()
    ]
    read = sorted(f"{tensor.file} {tensor.name} {tensor.dtype}" for tensor in tensors)
    scales: dict[Path, list[float]] = {}
    for merge in merges:
        scales.setdefault(merge.file.weights, []).append(merge.scale)
    files = {tensor.file for tensor in tensors} | set(scales)
    return {
        "tensors": hashlib.sha256("\n".join(read).encode()).hexdigest(),
        "files": {
            str(file.absolute()): [
                file.stat().st_size,
                file.stat().st_mtime_ns,
                *scales.get(file, ()),
            ]
            for file in sorted(files)
        },
    }
