"""What a path holds, in whatever layout: its networks, each with its config, its table and its tensors.

Layouts: the diffusers folder (a pipeline, or one network of it); the project's store, which is the same folder with the
weights under our names (`parameters.safetensors`) and the kind of model in `store.json`; a PEFT adapter; a LoRA file of
diffusers. Which one it is, is read off tensor names and config fields, never off the path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx

from checkpoints_convert import lora, rules, store, umt5, vae, wan
from checkpoints_convert.rules import Rule, Slot
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import FLOAT32
from jax_idgrpo.models.umt5 import UMT5Encoder
from jax_idgrpo.models.vae import WanVAE
from jax_idgrpo.models.wan import WanTransformer

INDEX = "model_index.json"
STORE = "store.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OUR_WEIGHTS = "parameters.safetensors"
KINDS = ("vace", "wan", "phantom")


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of network: its table, its module, the name of its weights in the published layout."""

    table: ModuleType
    build: Callable[[Any], nnx.Module]
    weights: str


FAMILIES = {
    "transformer": Family(
        wan,
        lambda config: WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)),
        "diffusion_pytorch_model.safetensors",
    ),
    "vae": Family(vae, lambda config: WanVAE(config, rngs=nnx.Rngs(0)), "diffusion_pytorch_model.safetensors"),
    "text_encoder": Family(
        umt5, lambda config: UMT5Encoder(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)), "model.safetensors"
    ),
}
CLASSES = {  # class named by a config.json -> part
    "WanTransformer3DModel": "transformer",
    "WanVACETransformer3DModel": "transformer",
    "AutoencoderKLWan": "vae",
    "UMT5EncoderModel": "text_encoder",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    part: transformer, vae, text_encoder or adapter. layout: diffusers, transformers, store, peft or diffusers-lora.
    values: its config as found, or for an adapter {r, lora_alpha}. table: published names against ours.
    shapes: abstract parameters. tensors: what the files hold, by the names of the layout.
    """

    part: str
    layout: str
    values: Mapping[str, Any]
    table: list[Rule]
    shapes: Any
    tensors: Mapping[str, store.LazyTensor]
    source: Path

    @property
    def slots(self) -> list[Slot]:
        """The table written out, in the layout that the tensors are in."""
        return rules.expand(rules.stored(self.table) if self.layout == "store" else self.table, self.shapes)

    def matched(self) -> Iterator[tuple[Slot, store.LazyTensor]]:
        """Each slot with its tensor; ConversionError when they do not fit."""
        found = rules.match(self.slots, self.tensors, str(self.source))
        return ((slot, found[slot.torch]) for slot in self.slots)


@dataclasses.dataclass(frozen=True)
class Moved:
    """A tensor with its axes moved when it is written or compared."""

    tensor: Any  # of a file, or itself moved
    move: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.move(np.asarray(self.tensor)), dtype=dtype, copy=copy)


def ours(network: Network) -> dict[str, Moved]:
    """The tensors under our names and in our layout."""
    return {slot.name: Moved(tensor, slot.op.apply, slot.shape) for slot, tensor in network.matched()}


def published(network: Network, table: list[Rule] | None = None) -> dict[str, Moved]:
    """The tensors under the names of `table` (default: the network's own) and in torch's layout."""
    parameters = ours(network)
    return {
        slot.torch: Moved(parameters[slot.name], slot.op.invert, slot.torch_shape)
        for slot in rules.expand(table or network.table, network.shapes)
    }


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Complaints about what a config says as UserErrors that name the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; it should describe this network") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error  # some libraries complain over many lines
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def open_network(folder: Path) -> Network:
    """One network with its `config.json`, in the published layout or the store's."""
    values = store.read_json(folder / "config.json")
    named = values.get("_class_name") or next(iter(values.get("architectures") or []), None)
    if named not in CLASSES:
        hint = "the original Wan layout is not read yet" if "model_type" in values else "no network of this project"
        raise UserError(f"{folder / 'config.json'}: describes {named or 'no class'}, {hint}; give {', '.join(CLASSES)}")
    part = CLASSES[named]
    family = FAMILIES[part]
    with naming(folder / "config.json"):
        config = family.table.config_from_json(values)
    tensors = store.open_tensors(folder)
    return Network(
        part=part,
        layout="store" if rules.is_stored(tensors) else "transformers" if part == "text_encoder" else "diffusers",
        values=values,
        table=family.table.rules(config),
        shapes=nnx.state(nnx.eval_shape(lambda: family.build(config))),
        tensors=tensors,
        source=folder,
    )


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """(weights, PEFT config or None) of an adapter folder or file."""
    weights = path
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        weights = path / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise UserError(f"{weights}: no such file beside {ADAPTER_CONFIG}; get the whole adapter folder")
    else:
        weights = store.weights_file(path)
    config = weights.parent / ADAPTER_CONFIG
    return weights, config if weights.name == ADAPTER_WEIGHTS and config.exists() else None


def adapter_scale(path: Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter: from the PEFT config, the file's header, or, without either, alpha = rank."""
    weights, config = adapter_files(path)
    tensors, metadata = store.open_file(weights)
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight") and tensor.shape}
    if len(ranks) != 1:
        found = f"ranks {sorted(ranks)}" if ranks else "no tensor named *.lora_A.weight"
        raise UserError(f"{weights}: {found}; it should be a LoRA of one rank")
    rank = ranks.pop()
    if config is None and lora.HEADER not in metadata:
        return rank, float(rank)
    file = weights if config is None else config
    with naming(file):
        if config is None:
            stated, alpha = lora.scale_from_header(json.loads(metadata[lora.HEADER]))
        else:
            stated, alpha = lora.scale_from_json(store.read_json(config))
    if stated != rank:
        raise UserError(f"{file}: says rank {stated}, the tensors of {weights.name} have {rank}; get both files again")
    return rank, alpha


def open_adapter(path: Path) -> Network:
    """A LoRA adapter: a PEFT folder, or a safetensors file with PEFT's, diffusers' or no prefix."""
    weights, config = adapter_files(path)
    rank, alpha = adapter_scale(path)
    tensors, _ = store.open_file(weights)
    prefix = lora.prefix(tensors)
    table = lora.rules(lora.stacks_of(tensors, prefix), prefix)
    return Network(
        part="adapter",
        layout="peft" if config is not None else "diffusers-lora",
        values=lora.config_to_json(rank, alpha),
        table=table,
        shapes=rules.infer(table, tensors, str(weights)),
        tensors=tensors,
        source=weights,
    )


def open_checkpoint(path: str | Path) -> list[Network]:
    """The networks at `path`: those of a pipeline folder, a single one, or an adapter. UserError for anything else."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a checkpoint")
    if (path / INDEX).is_file():
        missing = [part for part in FAMILIES if not (path / part).is_dir()]
        if missing:
            raise UserError(f"{path}: has no folder {missing[0]}/; get the whole pipeline")
        return [open_network(path / part) for part in FAMILIES]
    if (path / ADAPTER_CONFIG).is_file():
        return [open_adapter(path)]
    if (path / "config.json").is_file():
        return [open_network(path)]
    if path.suffix == ".pth":
        raise UserError(f"{path}: .pth files are not read yet; give a diffusers folder or a PEFT adapter")
    if path.is_file() or list(path.glob("*.safetensors")):
        return [open_adapter(path)]
    raise UserError(f"{path}: is no diffusers folder, adapter or store; it has no {INDEX}, config.json or safetensors")


def kind(path: Path, control: bool) -> str:
    """vace, wan or phantom: as the store at `path` says, else vace or wan by whether the transformer takes control."""
    if (path / STORE).is_file():
        stated = store.read_json(path / STORE).get("kind")
        if stated not in KINDS:
            raise UserError(f"{path / STORE}: kind is {stated!r}, not one of {', '.join(KINDS)}; import it again")
        return stated
    return "vace" if control else "wan"


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_pipeline(networks: list[Network], destination: Path, layout: str, kind: str) -> None:
    """A whole pipeline in the `store` or `diffusers` layout; tensors pass through one at a time, bit for bit."""
    root = networks[0].source.parent
    with store.aside(destination, INDEX) as new:
        new.mkdir()
        for network in networks:
            (new / network.part).mkdir()
            shutil.copyfile(network.source / "config.json", new / network.part / "config.json")
            if layout == "store":
                store.write_file(new / network.part / OUR_WEIGHTS, ours(network))
            else:
                store.write_file(new / network.part / FAMILIES[network.part].weights, published(network))
        for part in ("scheduler", "tokenizer"):
            if not (root / part).is_dir():
                raise UserError(f"{root}: has no folder {part}/; get the whole pipeline")
            shutil.copytree(root / part, new / part, copy_function=shutil.copyfile)
        shutil.copyfile(root / INDEX, new / INDEX)
        if layout == "store":
            store.write_json(new / STORE, {"kind": kind, "version": 1})


def write_adapter(network: Network, destination: Path) -> None:
    """A PEFT directory, which `peft` loads and this project reads; dtypes kept."""
    table = lora.rules(lora.stacks_of((rule.jax for rule in network.table), ""))
    with store.aside(destination, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, dict(network.values))
        store.write_file(new / ADAPTER_WEIGHTS, published(network, table))


# ---- comparing -------------------------------------------------------------------------------------------------------


def differences(left: list[Network], right: list[Network]) -> Iterator[str]:
    """One sentence per tensor that is not in both checkpoints with the same shape, dtype and bits; also for configs."""
    sides = [{network.part: network for network in networks} for networks in (left, right)]
    for part in sorted(set(sides[0]) | set(sides[1])):
        if not all(part in side for side in sides):
            yield f"{part} is only in {(sides[0] if part in sides[0] else sides[1])[part].source}"
            continue
        if part == "adapter":
            scales = [(side[part].values["r"], side[part].values["lora_alpha"]) for side in sides]
            if scales[0] != scales[1]:
                yield f"adapter: rank and alpha are {scales[0]} and {scales[1]}"
        elif len({FAMILIES[part].table.config_from_json(side[part].values) for side in sides}) > 1:
            yield f"{part}: the configs describe different networks"
        a, b = (ours(side[part]) for side in sides)
        for name in sorted(set(a) | set(b)):
            if name not in a or name not in b:
                yield f"{part}: {name} is only in {(sides[0] if name in a else sides[1])[part].source}"
            elif a[name].shape != b[name].shape:
                yield f"{part}: {name} has shapes {list(a[name].shape)} and {list(b[name].shape)}"
            elif a[name].dtype != b[name].dtype:
                yield f"{part}: {name} has dtypes {a[name].dtype} and {b[name].dtype}"
            elif count := _different(np.asarray(a[name]), np.asarray(b[name])):
                yield f"{part}: {name} differs in {count} of {np.prod(a[name].shape, dtype=int)} values"


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many values differ in their bits."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return int(np.count_nonzero(np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)))
