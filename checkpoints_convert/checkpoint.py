"""Open the networks at a path, in any layout.

    diffusers   a folder of a pipeline, or of one of its networks
    original    a folder of Wan's or Phantom's repository, or one of its files
    store       the project's: the diffusers folder with the weights under our names
                (`parameters*.safetensors`) and the kind of model in `store.json`
    adapter     a PEFT folder, or a LoRA file of diffusers
    face        a file of a face network

The names of the tensors identify network and layout; the name of the file is not used. Phantom and
the other reference models without control have exactly plain Wan's tensors, so the user, the store
or the class in the published `config.json` states the kind.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoints_convert import (
    contents,
    experts,
    faces,
    quantized,
    rules,
    spiece,
    store,
    vace_module,
)
from checkpoints_convert.adapter import open_adapter
from checkpoints_convert.contents import Options
from checkpoints_convert.identify import (
    ADAPTER,
    CLASSES,
    FACE,
    FAMILIES,
    KINDS,
    STANDALONE,
    TEXT_ENCODER,
    TRANSFORMER,
    identify,
    is_module,
    refuse_others,
)
from checkpoints_convert.lazy import LazyTensor, size
from checkpoints_convert.network import Network, naming, shapes_of
from checkpoints_convert.places import ADAPTER_CONFIG, adapter_place, checkpoint_place
from jax_idgrpo.config.model_kinds import MODEL_KINDS
from jax_idgrpo.errors import UserError

INDEX = "model_index.json"
STORE = "store.json"
STORE_VERSION = 2  # version 1 had transposed matrices
SCHEDULER_CONFIG = "scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
KIND_MISMATCH = {  # whether the stated kind is VACE -> message
    True: "is no VACE model but plain Wan (T2V), which takes no reference photos; pass a VACE "
    "checkpoint, or, if this is Phantom, state it with --model.kind phantom (idgrpo-convert: --as "
    "phantom); the same for refalign and skyreels",
    False: "kind {stated!r} was given, this transformer is 'vace'; leave the kind out",
}
COMPUTING = Options()  # weights for computing, dequantized to float32


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The networks at a path.

    Attributes:
      path: folder or file.
      networks: networks by part. With two experts, "transformer" is the one for high noise and
        "transformer_2" the one for low noise.
      kind: one of `MODEL_KINDS`; None without a transformer.
      tokenizer: folder of the tokenizer, if there is one.
      scheduler: folder of the scheduler, if there is one.
      embedded: tokenizer in the file of the text encoder, if there is no folder of one.
      boundary: share of the timesteps from which the high-noise expert runs; None for one
        transformer.
    """

    path: Path
    networks: Mapping[str, Network]
    kind: str | None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    embedded: spiece.Model | None = None
    boundary: float | None = None

    @functools.cached_property
    def tokenizer_texts(self) -> dict[str, str]:
        """The files of the tokenizer that is embedded in the text encoder, by name; {} for none."""
        if self.embedded is None:
            return {}
        with naming(self.networks[TEXT_ENCODER].source):
            return spiece.files(self.embedded)

    @property
    def notes(self) -> list[str]:
        """What was chosen, left out or dequantized, here and when the store was imported."""
        file = self.path / STORE
        stored = store.read_json(file).get("notes") if file.is_file() else None
        told = [str(note) for note in stored] if isinstance(stored, list) else []
        return told + [
            f"{part}: {notice}"
            for part, network in self.networks.items()
            for notice in network.notices
        ]

    @property
    def adapter(self) -> Network | None:
        """The adapter, if the checkpoint is one."""
        return self.networks.get(ADAPTER)

    def missing(self) -> list[str]:
        """List the missing parts of the pipeline; none if this is an adapter or a face network."""
        if any(part in self.networks for part in STANDALONE):
            return []
        parts = [part for part in FAMILIES if part not in self.networks]
        return parts + ["tokenizer"] * (self.tokenizer is None and self.embedded is None)


# ---- networks ------------------------------------------------------------------------------------


def open_network(path: Path, kind: str | None = None, options: Options = COMPUTING) -> Network:
    """Open one network: a folder with `config.json` and weights, or a file of weights.

    Args:
      path: the folder or file.
      kind: kind of the transformer; some allow additional tensors, which published files have.
      options: what the user states about the file.

    Raises:
      UserError: there is no network that can be read.
    """
    return _network(store.weights_file(path), kind, options=options)


def _network(
    file: Path, kind: str | None, alpha: float | None = None, options: Options = COMPUTING
) -> Network:
    """Open the network in a file of weights or in the shards of an index.

    Args:
      file: file of weights or index.
      kind: as in `open_network`.
      alpha: as in `adapter_scale`.
      options: as in `open_network`.
    """
    if not store.entries(file) and (face := open_face(file, store.open_tensors(file))) is not None:
        return face
    found = contents.read(file, options.entry)
    tensors = quantized.dequantized(found.tensors, file, options.dtype)
    told = quantized.notice(tensors.values())
    notices = (*found.notices, *([told] if told else []))
    identified = identify(tensors)
    if identified is None:
        names = ", ".join(sorted(tensors)[:3]) or "none"
        raise UserError(
            f"{file}: its tensors ({names}, ...) are of no network of this project; give one of "
            f"{', '.join(FAMILIES)}, {FACE}"
        )
    part, layout = identified
    if part == ADAPTER:
        return open_adapter(file, alpha)
    if part == TRANSFORMER and is_module(tensors) and options.base is not None:
        base = open_part(options.base, TRANSFORMER, options=dataclasses.replace(options, base=None))
        network = vace_module.overlay(tensors, layout, base, file)
        return dataclasses.replace(network, notices=(*notices, *network.notices))
    with naming(file):
        refuse_others(tensors)
    family, beside, original = FAMILIES[part], file.parent / "config.json", None
    # ComfyUI distributes the text encoder as a single file, beside a transformer or not.
    alone = part == TEXT_ENCODER and layout == "transformers" and not _is_umt5_config(beside)
    if layout != "original" and not alone:
        values = store.read_json(beside)
        named = values.get("_class_name") or next(iter(values.get("architectures") or []), None)
        with naming(beside):
            config = family.table.config_from_json(values)
        if CLASSES.get(str(named)) != part:  # such as a class that contains this network
            values = family.table.config_to_json(config)
    else:
        if part == TRANSFORMER and layout == "original" and beside.is_file():
            original = store.read_json(beside)
        with naming(file if original is None else beside):
            config = family.table.config_from_shapes(
                tensors, layout, *([original] if part == TRANSFORMER else [])
            )
        values = family.table.config_to_json(config)
    return Network(
        part=part,
        layout=layout,
        config=config,
        values=values,
        table=family.table.rules(config, family.published if layout == "store" else layout),
        shapes=shapes_of(part, config),
        tensors=tensors,
        source=file,
        original=original,
        surplus=MODEL_KINDS[kind].surplus
        if kind is not None and part == TRANSFORMER and layout == "original"
        else "",
        notices=notices,
    )


def _is_umt5_config(file: Path) -> bool:
    """Return whether a config.json may describe a text encoder; the original Wan's does not."""
    return file.is_file() and "dim" not in store.read_json(file)


def open_face(file: Path, tensors: Mapping[str, LazyTensor]) -> Network | None:
    """Open a face network, as published by deepface, insightface or CurricularFace, or as a store.

    None for another network.
    """
    beside = file.parent / "config.json"
    stored = rules.is_stored(tensors) and beside.is_file()
    if stored:
        values = store.read_json(beside)
        if values.get("architecture") not in faces.NETWORKS:
            return None
        with naming(beside):
            config = faces.config_from_json(faces.NETWORKS[values["architecture"]].config, values)
    else:
        known = faces.known(tensors)
        if known is None:
            return None
        name, architecture, config = known
        values = {
            "architecture": architecture,
            "config": json.loads(json.dumps(dataclasses.asdict(config))),
            "name": name,
        }
    table, shapes = faces.with_unused_tensors(values["architecture"], config, tensors)
    return Network(
        part=FACE,
        layout="store" if stored else "original",
        config=config,
        values=values,
        table=table,
        shapes=shapes,
        tensors=tensors,
        source=file,
    )


# ---- checkpoints ---------------------------------------------------------------------------------


def open_checkpoint(
    path: str | Path,
    kind: str | None = None,
    alpha: float | None = None,
    options: Options = COMPUTING,
) -> Checkpoint:
    """Open a pipeline or some of its networks, an adapter, or a face network.

    Args:
      path: a folder or a file of any layout, an entry of the Hugging Face cache, or the workdir of
        a run, which stands for its adapter.
      kind: kind of the transformer. Required for a reference model without control unless the store
        or the class in its `config.json` states it, because its tensors are plain Wan's.
      alpha: alpha of an adapter that does not state it.
      options: as in `open_network`; a folder of several files has no entry.

    Raises:
      UserError: `path` holds something else, or something damaged or unsupported.
    """
    path = Path(path)
    path = checkpoint_place(path) if (path / INDEX).is_file() else adapter_place(path)
    boundary = _boundary(path)
    found: list[tuple[str, Network]]
    if (path / ADAPTER_CONFIG).is_file():
        found = [(ADAPTER, open_adapter(path, alpha))]
    elif (path / INDEX).is_file():
        kind = _stated_kind(path, kind)
        parts = [*FAMILIES] + [experts.SECOND] * (boundary is not None)
        missing = [part for part in parts if not (path / part).is_dir()]
        if missing:
            raise UserError(f"{path}: has no folder {missing[0]}/; get the whole pipeline")
        found = [(part, open_network(path / part, kind, options)) for part in parts]
        for part, network in found:
            if network.part != experts.family(part):
                raise UserError(
                    f"{network.source}: holds a {network.part}, not the {part}; get the pipeline "
                    "again"
                )
    else:
        kind = _stated_kind(path, kind)
        opened = [_network(file, kind, alpha, options) for file in store.weights_files(path)]
        found = [(network.part, network) for network in opened]
        for part, folder in experts.original_folders(path).items():
            found.append((part, open_network(folder, kind, options)))
        if not found:
            store.refuse_foreign(path)
            if pair := experts.expert_adapters(path):
                names = " and ".join(place.name for place in pair)
                raise UserError(
                    f"{path}: holds the adapters of two transformers, {names}; give one of them"
                )
            raise UserError(
                f"{path}: no {INDEX} in it, and no weights; give a diffusers folder, original "
                "folder, adapter or store"
            )
    by_part: dict[str, Network] = {}
    for part, network in found:
        if part in by_part:
            first = by_part[part].source
            raise UserError(
                f"{path}: holds two of {part}, {first.name} and {network.source.name}; "
                "give one file, or keep one"
            )
        by_part[part] = network
    second = by_part.get(experts.SECOND)
    if second is not None and second.config != by_part[TRANSFORMER].config:
        raise UserError(
            f"{second.source}: describes another network than {by_part[TRANSFORMER].source}; two "
            "transformers must have equal sizes"
        )
    scheduler = path / "scheduler"
    tokenizer = None if set(STANDALONE) & set(by_part) else tokenizer_folder(path)
    embedded = None
    if tokenizer is None and TEXT_ENCODER in by_part:
        by_part[TEXT_ENCODER], embedded = _embedded_tokenizer(by_part[TEXT_ENCODER])
    return Checkpoint(
        path=path,
        networks=by_part,
        kind=_kind(by_part[TRANSFORMER], kind) if TRANSFORMER in by_part else None,
        tokenizer=tokenizer,
        scheduler=scheduler if (scheduler / SCHEDULER_CONFIG).is_file() else None,
        embedded=embedded,
        boundary=boundary,
    )


def _embedded_tokenizer(network: Network) -> tuple[Network, spiece.Model | None]:
    """Read the tokenizer in the file of a text encoder; a notice says why one is not read."""
    tensor = network.tensors.get(spiece.TENSOR)
    if tensor is None:
        return network, None
    try:
        if tensor.dtype != np.uint8 or size(tensor) > spiece.LIMIT:
            raise ValueError(f"it is {tensor.dtype} of shape {list(tensor.shape)}")
        return network, spiece.parse(np.asarray(tensor).tobytes())
    except ValueError as error:
        notice = f"its embedded tokenizer is left out, as it cannot be read ({error})"
        return dataclasses.replace(network, notices=(*network.notices, notice)), None


def _boundary(path: Path) -> float | None:
    """Return the boundary between two experts; None for one transformer."""
    if (path / INDEX).is_file():
        return experts.index_boundary(path / INDEX, store.read_json(path / INDEX))
    return experts.BOUNDARY if path.is_dir() and experts.original_folders(path) else None


def default_shift(checkpoint: Checkpoint) -> float:
    """Return the flow shift of a checkpoint whose layout has no scheduler config."""
    if checkpoint.boundary is not None:
        return experts.SHIFT
    return MODEL_KINDS[str(checkpoint.kind)].shift


def tokenizer_folder(path: Path) -> Path | None:
    """Find the folder with the tokenizer in a checkpoint of any layout.

    It is `tokenizer/`, `google/umt5-xxl/`, or the checkpoint itself.
    """
    path = checkpoint_place(path)
    places = (
        file.parent
        for depth in ("", "*/", "*/*/")
        for file in sorted(path.glob(f"{depth}{TOKENIZER_CONFIG}"))
    )
    return next(places, None)


def open_part(
    path: str | Path, part: str, kind: str | None = None, options: Options = COMPUTING
) -> Network:
    """Open one part of the pipeline at `path`, and no other if they are in separate folders.

    Args:
      path: a folder of any layout.
      part: transformer, transformer_2, vae or text_encoder.
      kind: as in `open_network`.
      options: as in `open_network`.

    Raises:
      UserError: the part is missing or cannot be read.
    """
    path = checkpoint_place(path)
    folders = experts.original_folders(path)
    folder = folders.get(part, path / part)
    if folder.is_dir() or not path.is_dir() or (path / INDEX).is_file():
        network = open_network(folder if path.is_dir() else path, kind, options)
        if network.part != experts.family(part):
            raise UserError(
                f"{network.source}: holds a {network.part}, not a {part}; get the folder again"
            )
        return network
    networks = open_checkpoint(path, kind, options=options).networks
    if part not in networks:
        raise UserError(
            f"{path}: holds {', '.join(networks)}, no {part}; give the folder of a whole pipeline"
        )
    return networks[part]


def boundary_of(path: str | Path) -> float | None:
    """Read the boundary between two experts of a folder of any layout; None for one transformer.

    Raises:
      UserError: the folder does not exist, or is half of a pipeline with two experts.
    """
    return _boundary(checkpoint_place(path))


def completed(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Take the missing parts of `checkpoint` from `other`, such as Wan's VAE for Phantom."""
    whole = TRANSFORMER in checkpoint.networks  # then a second transformer of `other` is not taken
    rest = {
        part: network
        for part, network in other.networks.items()
        if not (whole and experts.family(part) == TRANSFORMER)
    }
    return dataclasses.replace(
        checkpoint,
        networks={**rest, **checkpoint.networks},
        boundary=checkpoint.boundary if whole else other.boundary,
        kind=checkpoint.kind or other.kind,
        tokenizer=checkpoint.tokenizer or other.tokenizer,
        embedded=checkpoint.embedded or other.embedded,
    )


def _stated_kind(path: Path, stated: str | None) -> str | None:
    """Return the kind that the user (`stated`) or the store states; UserError if they differ."""
    file = path / STORE
    if not file.is_file():
        return stated
    values = store.read_json(file)
    stored = values.get("kind")
    if values.get("version") != STORE_VERSION:
        raise UserError(
            f"{file}: is a store of version {values.get('version')!r}, this program reads "
            f"{STORE_VERSION}; import it again"
        )
    if stored not in (None, *KINDS):
        raise UserError(
            f"{file}: kind is {stored!r}, not one of {', '.join(KINDS)}; import it again"
        )
    if stated is not None and stored is not None and stated != stored:
        if "wan" not in (stated, stored) and stored != "vace":
            raise UserError(f"{path}: {_of_kind(stored, stated)}")
        if "vace" in (stated, stored):
            raise UserError(f"{path}: {KIND_MISMATCH[stated == 'vace'].format(stated=stated)}")
    return stated or stored


def _of_kind(found: str, stated: str) -> str:
    return (
        f"is a model of kind {found}, and kind {stated} was given; pass --model.kind {found} "
        "(idgrpo-convert: leave --as out)"
    )


def _kind(transformer: Network, stated: str | None) -> str:
    """Return the kind of a transformer: as stated, as its class tells, or vace or wan."""
    detected = "wan" if transformer.config.vace is None else "vace"
    named = str(transformer.values.get("_class_name"))
    for name, kind in MODEL_KINDS.items():
        if named == kind.class_name:
            if stated not in (None, name):
                raise UserError(f"{transformer.source}: {_of_kind(name, str(stated))}")
            return name
    if stated is not None and (stated == "vace") != (detected == "vace"):
        raise UserError(
            f"{transformer.source}: {KIND_MISMATCH[stated == 'vace'].format(stated=stated)}"
        )
    return stated or detected
