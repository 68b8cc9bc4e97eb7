"""Checkpoints out, in every layout: the project's store, diffusers folders, the original repositories' folders, adapters.

Tensors pass through chunk by chunk and keep their dtype and every bit. A folder of weights is written beside its destination
and renamed when it is whole; a run that was killed is continued by the next one that writes the same, file by file.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

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
from checkpoints_convert.lazy import size
from checkpoints_convert.network import Network, ours, published, renamed
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import FLOAT32, LoRAParam
from jax_idgrpo.models.wan import WanTransformer

GIGABYTE = 10**9
SHARD = 5 * GIGABYTE  # as diffusers and transformers cut
ORIGINAL_SHARD = 10 * GIGABYTE  # as the original repositories are cut
STORE_STEM = "parameters"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
PIPELINE_CLASSES = {"vace": "WanVACEPipeline", "wan": "WanPipeline", "phantom": "WanPipeline"}

Watch = Callable[
    [int, int], AbstractContextManager[store.Progress]
]  # (bytes in all, bytes done) -> what is told of each


def unwatched(total: int, done: int) -> AbstractContextManager[store.Progress]:
    """No progress bar."""
    return nullcontext(store.silent)


@dataclasses.dataclass(frozen=True)
class Files:
    """A set of tensors and the files of a folder that they go to.

    folder: inside the checkpoint, "" for itself. stem: of the names of safetensors files, cut at `limit` bytes; or the whole
    name of one `.pth` file.
    """

    folder: str
    stem: str
    tensors: Mapping[str, Any]
    limit: int = SHARD

    def cut(self) -> dict[str, dict[str, Any]]:
        """File name -> tensors."""
        if self.stem.endswith(".pth"):
            return {self.stem: dict(self.tensors)}
        parts = store.shards(self.tensors, self.limit)
        return dict(zip(store.shard_names(self.stem, len(parts)), parts, strict=True))


def write_store(checkpoint: Checkpoint, destination: Path, watch: Watch = unwatched) -> None:
    """The project's store, whole pipeline or single network; it remembers the kind and the original config."""
    networks = checkpoint.networks.values()
    alone = len(networks) == 1
    remembered: dict[str, Any] = {"kind": checkpoint.kind, "version": STORE_VERSION}
    original = next(
        (network.original for network in networks if network.original is not None), None
    )
    if original is not None:
        remembered["original_config"] = original
    files = []
    for network in networks:
        tensors = renamed(ours(network), rules.stored(network.table), network.shapes)
        files.append(Files("" if alone else network.part, STORE_STEM, tensors))
    _write(
        checkpoint,
        destination,
        files,
        _diffusers_texts(checkpoint) | {STORE: remembered},
        "tokenizer",
        watch,
    )


def write_diffusers(
    checkpoint: Checkpoint,
    destination: Path,
    card: str,
    watch: Watch = unwatched,
    shard: int = SHARD,
    adapter: Network | None = None,
) -> None:
    """The diffusers folder, whole pipeline or single network, weights cut into files of `shard` bytes.

    adapter: merged into the transformer. UserError for another model's adapter.
    """
    alone = len(checkpoint.networks) == 1
    files = []
    for network in checkpoint.networks.values():
        family, parameters = FAMILIES[network.part], ours(network)
        if adapter is not None and network.part == TRANSFORMER:
            parameters |= _merged(network, parameters, adapter)
        tensors = renamed(
            parameters, family.table.rules(network.config, family.published), network.shapes
        )
        files.append(Files("" if alone else network.part, family.weights, tensors, shard))
    texts = _diffusers_texts(checkpoint) | {CARD: card}
    _write(checkpoint, destination, files, texts, "tokenizer", watch, [adapter] if adapter else [])


def write_original(
    checkpoint: Checkpoint,
    destination: Path,
    card: str,
    watch: Watch = unwatched,
    shard: int = ORIGINAL_SHARD,
) -> None:
    """The folder of the original repositories; Phantom's transformer is named as Phantom's are."""
    files = []
    texts: dict[str, Any] = {CARD: card}
    for network in checkpoint.networks.values():
        if network.part == FACE:
            files.append(
                Files(
                    "",
                    faces.file_name(network.values["architecture"], network.config),
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
    _write(checkpoint, destination, files, texts, ORIGINAL_TOKENIZER, watch)


def _original_config(checkpoint: Checkpoint, network: Network) -> Mapping[str, Any]:
    """The config that the source came with, while it describes the same network; else one of ours."""
    found = network.original
    if found is None and (checkpoint.path / STORE).is_file():
        found = store.read_json(checkpoint.path / STORE).get("original_config")
    made = wan.config_to_original(network.config)
    sizes = ("dim", "eps", "num_heads", "num_layers", "vace_layers")
    return (
        made if found is None or any(found.get(name) != made.get(name) for name in sizes) else found
    )


def _diffusers_texts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The small files of the diffusers layout by their place: configs, the index, the scheduler."""
    networks = checkpoint.networks
    if len(networks) == 1:
        return {"config.json": dict(next(iter(networks.values())).values)}
    if missing := checkpoint.missing():
        raise UserError(
            f"{checkpoint.path}: has no {', '.join(missing)}; give the folder that has with --with, or one network's file alone"
        )
    texts: dict[str, Any] = {
        f"{part}/config.json": dict(network.values) for part, network in networks.items()
    }
    assert checkpoint.kind is not None and checkpoint.tokenizer is not None
    if checkpoint.scheduler is None:
        texts[f"scheduler/{SCHEDULER_CONFIG}"] = wan.scheduler_to_json(SHIFTS[checkpoint.kind])
    else:
        texts[f"scheduler/{SCHEDULER_CONFIG}"] = store.read_json(
            checkpoint.scheduler / SCHEDULER_CONFIG
        )
    if (checkpoint.path / INDEX).is_file():
        texts[INDEX] = store.read_json(checkpoint.path / INDEX)
        return texts
    tokenizer = store.read_json(checkpoint.tokenizer / TOKENIZER_CONFIG).get(
        "tokenizer_class", "T5TokenizerFast"
    )
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
    watch: Watch,
    besides: Sequence[Network] = (),
) -> None:
    """Write all files of a folder, which appears whole or not at all.

    texts: place -> JSON object, or text. besides: other sources of the tensors.
    """
    files: dict[str, dict[str, Any]] = {}
    markers = (
        [INDEX] if INDEX in texts else []
    )  # a name that only a checkpoint has: config.json and README.md are in many folders
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
            elif (same := _as_found(checkpoint, name, content)) is not None:
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
        with watch(sum(sizes.values()), sum(done.values())) as written:
            for name, tensors in files.items():
                if name not in done:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    store.write_file(new / name, tensors, written=written, check=True)


def _as_found(checkpoint: Checkpoint, name: str, content: Mapping[str, Any]) -> Path | None:
    """The file of the source that says the same at the same place, to be copied to the byte."""
    path = checkpoint.path / name
    return path if path.is_file() and store.read_json(path) == content else None


def _sources(networks: Sequence[Network]) -> dict[str, list[int]]:
    """Size and time of every file that tensors come from: what is resumed must come from the same."""
    files = {tensor.file for network in networks for tensor in network.tensors.values()}
    return {
        str(file.absolute()): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(files)
    }


# ---- adapters --------------------------------------------------------------------------------------------------------


def _adapter_tensors(network: Network, prefix: str) -> dict[str, Any]:
    table = lora.rules(lora.stacks_of((rule.jax for rule in network.table), ""), prefix)
    return dict(published(network, table))


def write_peft(network: Network, destination: Path, card: str | None = None) -> None:
    """A PEFT directory, which `peft` loads and this project reads; dtypes kept."""
    with store.atomic_path(destination, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, dict(network.values))
        store.write_file(
            new / ADAPTER_WEIGHTS, _adapter_tensors(network, lora.PEFT_PREFIX), check=True
        )
        if card is not None:
            (new / CARD).write_text(card, "utf-8")


def write_diffusers_lora(network: Network, destination: Path, card: str) -> None:
    """A folder for diffusers' `load_lora_weights`; rank and alpha are in the header of the file."""
    with store.atomic_path(destination, DIFFUSERS_LORA) as new:
        new.mkdir()
        tensors = _adapter_tensors(network, lora.DIFFUSERS_PREFIX)
        store.write_file(new / DIFFUSERS_LORA, tensors, lora.header(*network.config), check=True)
        (new / CARD).write_text(card, "utf-8")


@dataclasses.dataclass(frozen=True)
class Merged:
    """W + (alpha / R) A B of one projection, computed in float32 and stored in W's dtype; ours are [in, out], [in, R], [R, out]."""

    base: Any
    a: Any
    b: Any
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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        a, b, base = (np.asarray(value).astype(np.float32) for value in (self.a, self.b, self.base))
        base += np.float32(self.scale) * (a @ b)
        return np.asarray(base.astype(self.dtype), dtype=dtype, copy=copy)


def _merged(network: Network, parameters: Mapping[str, Any], adapter: Network) -> dict[str, Any]:
    """The parameters of the transformer that the adapter changes. UserError when it is not this transformer's."""
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
