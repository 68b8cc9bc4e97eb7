"""Write checkpoints as the project's store, diffusers folders, original folders, or adapters.

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

import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from checkpoints_convert import faces, lora, rules, store, wan
from checkpoints_convert.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints_convert.card import FILE as CARD
from checkpoints_convert.checkpoint import (
    INDEX,
    SCHEDULER_CONFIG,
    SHIFTS,
    STORE,
    STORE_VERSION,
    TOKENIZER_CONFIG,
    Checkpoint,
)
from checkpoints_convert.identify import FACE, FAMILIES, TRANSFORMER
from checkpoints_convert.lazy import Tensor, size
from checkpoints_convert.network import Moved, Network, ours, published, renamed
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import FLOAT32, LoRAParam
from jax_idgrpo.models.wan import WanTransformer

GIGABYTE = 10**9
SHARD = 5 * GIGABYTE  # as in diffusers and transformers
ORIGINAL_SHARD = 10 * GIGABYTE  # as in the original repositories
STORE_STEM = "parameters"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
PIPELINE_CLASSES = {"vace": "WanVACEPipeline", "wan": "WanPipeline", "phantom": "WanPipeline"}

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


def write_store(checkpoint: Checkpoint, destination: Path, bar: ProgressBar = no_bar) -> None:
    """Write the project's store of a pipeline or a single network.

    The store records the kind, the original config, and what was chosen or dequantized.

    Args:
      checkpoint: the checkpoint.
      destination: folder to write.
      bar: progress bar.
    """
    networks = checkpoint.networks.values()
    alone = len(networks) == 1
    record: dict[str, Any] = {"kind": checkpoint.kind, "version": STORE_VERSION}
    original = next(
        (network.original for network in networks if network.original is not None), None
    )
    if original is not None:
        record["original_config"] = original
    if checkpoint.notes:
        record["notes"] = checkpoint.notes
    files = []
    for network in networks:
        tensors = renamed(ours(network), rules.stored(network.table), network.shapes)
        files.append(Files("" if alone else network.part, STORE_STEM, tensors))
    _write(
        checkpoint,
        destination,
        files,
        _diffusers_texts(checkpoint) | {STORE: record},
        "tokenizer",
        bar,
    )


def write_diffusers(
    checkpoint: Checkpoint,
    destination: Path,
    card: str,
    bar: ProgressBar = no_bar,
    shard: int = SHARD,
    adapter: Network | None = None,
) -> None:
    """Write the diffusers folder of a pipeline or a single network.

    Args:
      checkpoint: the checkpoint.
      destination: folder to write.
      card: text of the model card.
      bar: progress bar.
      shard: largest number of bytes of a file.
      adapter: adapter to merge into the transformer.

    Raises:
      UserError: the adapter is made for another model, or a part of the pipeline is missing.
    """
    alone = len(checkpoint.networks) == 1
    files = []
    for network in checkpoint.networks.values():
        family, own = FAMILIES[network.part], ours(network)
        parameters: dict[str, Tensor] = dict(own)
        if adapter is not None and network.part == TRANSFORMER:
            parameters |= _merged(network, own, adapter)
        tensors = renamed(
            parameters, family.table.rules(network.config, family.published), network.shapes
        )
        files.append(Files("" if alone else network.part, family.weights, tensors, shard))
    texts = _diffusers_texts(checkpoint) | {CARD: card}
    _write(checkpoint, destination, files, texts, "tokenizer", bar, [adapter] if adapter else [])


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
    for network in checkpoint.networks.values():
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
        name = family.original
        if network.part == TRANSFORMER:
            texts["config.json"] = _original_config(checkpoint, network)
            if checkpoint.kind == "phantom":
                small = sum(map(size, tensors.values())) <= shard
                name = "Phantom-Wan-1.3B.pth" if small else "Phantom_Wan_14B.safetensors"
        files.append(Files("", name.removesuffix(".safetensors"), tensors, shard))
    _write(checkpoint, destination, files, texts, ORIGINAL_TOKENIZER, bar)


def _original_config(checkpoint: Checkpoint, network: Network) -> Mapping[str, object]:
    """Return the config of the source if it describes the same network, otherwise a new one."""
    found = network.original
    if found is None and (checkpoint.path / STORE).is_file():
        found = store.read_json(checkpoint.path / STORE).get("original_config")
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
        texts[f"scheduler/{SCHEDULER_CONFIG}"] = wan.scheduler_to_json(SHIFTS[checkpoint.kind])
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
    return texts


def _write(
    checkpoint: Checkpoint,
    destination: Path,
    sets: list[Files],
    texts: dict[str, Any],
    tokenizer: str,
    bar: ProgressBar,
    besides: Sequence[Network] = (),
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
        {"files": sizes, "sources": _sources([*checkpoint.networks.values(), *besides])},
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


def _sources(networks: Sequence[Network]) -> dict[str, Any]:
    """Describe the sources, which must be the same when writing is resumed.

    They are the size and time of every file, and the tensors that are read of them.
    """
    tensors = [tensor for network in networks for tensor in network.tensors.values()]
    read = sorted(f"{tensor.file} {tensor.name} {tensor.dtype}" for tensor in tensors)
    return {
        "tensors": hashlib.sha256("\n".join(read).encode()).hexdigest(),
        "files": {
            str(file.absolute()): [file.stat().st_size, file.stat().st_mtime_ns]
            for file in sorted({tensor.file for tensor in tensors})
        },
    }


# ---- adapters ------------------------------------------------------------------------------------


def _adapter_tensors(network: Network, prefix: str) -> dict[str, Moved]:
    table = lora.rules(lora.stacks_of((rule.jax for rule in network.table), ""), prefix)
    return published(network, table)


def write_peft(network: Network, destination: Path, card: str | None = None) -> None:
    """Write a PEFT directory, which `peft` and this project read; dtypes are kept.

    Args:
      network: the adapter.
      destination: folder to write.
      card: text of the model card, if any.
    """
    with store.atomic_path(destination, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, dict(network.values))
        store.write_file(
            new / ADAPTER_WEIGHTS, _adapter_tensors(network, lora.PEFT_PREFIX), check=True
        )
        if card is not None:
            (new / CARD).write_text(card, "utf-8")


def write_diffusers_lora(network: Network, destination: Path, card: str) -> None:
    """Write a folder for diffusers' `load_lora_weights`, with rank and alpha in the file's header.

    Args:
      network: the adapter.
      destination: folder to write.
      card: text of the model card.
    """
    with store.atomic_path(destination, DIFFUSERS_LORA) as new:
        new.mkdir()
        tensors = _adapter_tensors(network, lora.DIFFUSERS_PREFIX)
        store.write_file(new / DIFFUSERS_LORA, tensors, lora.header(*network.config), check=True)
        (new / CARD).write_text(card, "utf-8")


@dataclasses.dataclass(frozen=True)
class Merged:
    """The merged weight W + (alpha / R) A B of one projection.

    It is computed in float32 and stored in W's dtype.

    Attributes:
      base: W [in, out].
      a: A [in, R].
      b: B [R, out].
      scale: alpha / R.
    """

    base: Moved
    a: Moved
    b: Moved
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def origin(self) -> str:
        return f"{self.base.origin} with {self.a.origin}"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        a, b, base = (np.asarray(value).astype(np.float32) for value in (self.a, self.b, self.base))
        base += np.float32(self.scale) * (a @ b)
        return np.asarray(base.astype(self.dtype), dtype=dtype, copy=copy)


def _merged(
    network: Network, parameters: Mapping[str, Moved], adapter: Network
) -> dict[str, Merged]:
    """Return the parameters of the transformer that the adapter changes, merged.

    Args:
      network: the transformer.
      parameters: parameters of the transformer, by our names.
      adapter: the adapter.

    Raises:
      UserError: the adapter is made for another model.
    """
    rank, alpha = adapter.config
    config = dataclasses.replace(network.config, rank=rank, alpha=alpha)
    if (what := lora.misfit(adapter.tensors, network.config)) is not None:
        raise UserError(
            f"{adapter.source} on {network.source}: {what}; give an adapter of this model"
        )
    abstract = nnx.state(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0))), LoRAParam
    )
    slots = rules.expand(
        lora.rules(wan.block_stacks(config), lora.prefix(adapter.tensors)), abstract
    )
    rules.match(slots, adapter.tensors, f"{adapter.source} on {network.source}")
    parts = ours(adapter)
    changed = {}
    for module in sorted({slot.name.rpartition(".")[0] for slot in slots}):
        base = parameters[f"{module}.kernel"]
        changed[f"{module}.kernel"] = Merged(
            base, parts[f"{module}.lora_a"], parts[f"{module}.lora_b"], alpha / rank
        )
    return changed
