"""Read and write a video model: transformer, VAE, text encoder and tokenizer as one object.

A model is read from a folder of any layout that `checkpoints_convert` supports and written to a
diffusers folder:

    model_index.json  scheduler/  text_encoder/  tokenizer/  transformer/  vae/

Names and layouts come from the tables of `checkpoints_convert`. Tensors are cast only to the
requested dtype policy. Folders are written under a temporary name and renamed, so a reader finds a
complete folder or none.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from checkpoints_convert import checkpoint, experts, identify, network, store, umt5, vae, wan
from checkpoints_convert.checkpoint import INDEX
from checkpoints_convert.experts import expert_places
from checkpoints_convert.hub import is_name
from checkpoints_convert.places import LoRASum, checkpoint_place
from checkpoints_convert.rules import Rule, leaves, to_torch
from jax_idgrpo import rng
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.adapters import (
    BASE,
    add_adapters,
    load_lora_state,
    lora_config,
    with_adapter,
)
from jax_idgrpo.sampling.tokenizer import ExtensibleTokenizer, load_tokenizer, read_tokenizer

Network = TypeVar("Network", bound=nnx.Module)

PARTS = {  # part -> library, and the file and key that name the part's class
    "scheduler": ("diffusers", "scheduler_config.json", "_class_name"),
    "text_encoder": ("transformers", "config.json", "architectures"),
    "tokenizer": ("transformers", "tokenizer_config.json", "tokenizer_class"),
    "transformer": ("diffusers", "config.json", "_class_name"),
    experts.SECOND: ("diffusers", "config.json", "_class_name"),
    "vae": ("diffusers", "config.json", "_class_name"),
}


@dataclasses.dataclass
class Pipeline:
    """The networks of one video model.

    Attributes:
      transformer: the velocity network, with or without an adapter; with two experts, the one for
        high noise.
      vae: the video autoencoder.
      text_encoder: the prompt encoder.
      tokenizer: of transformers. With padding="max_length", max_length=L and truncation=True it
        preserves the final end-of-sequence token.
      shift: of the schedule, the scheduler's `flow_shift`.
      kind: one of `config.model_kinds.MODEL_KINDS`.
      path: the folder that was read.
      transformer_2: the expert for low noise; None for a model with one transformer.
      boundary: share of the timesteps from which `transformer` runs; None for one transformer.
    """

    transformer: WanTransformer
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Any
    shift: float
    kind: str
    path: Path
    transformer_2: WanTransformer | None = None
    boundary: float | None = None

    @property
    def transformers(self) -> tuple[WanTransformer, ...]:
        """The transformer, or the experts for high and low noise."""
        if self.transformer_2 is None:
            return (self.transformer,)
        return self.transformer, self.transformer_2

    @transformers.setter
    def transformers(self, networks: Sequence[WanTransformer]) -> None:
        self.transformer, *second = networks
        self.transformer_2 = second[0] if second else None

    def load_lora(self, path: str | Path | LoRASum) -> None:
        """Load the adapter at `path` into the transformer, replacing an adapter that it has.

        Args:
          path: a PEFT directory, the workdir of a run, or a file of weights in any dialect of
            `checkpoints_convert.lora_dialects`; or a sum of these. For a model with two experts, a
            folder with two of these, whose names hold `high_noise` and `low_noise`, or a workdir.

        Raises:
          UserError: the adapter is of another model or of an unsupported kind.
        """
        places = expert_places(path, len(self.transformers))
        self.transformers = [
            _with_lora(transformer, place)
            for transformer, place in zip(self.transformers, places, strict=True)
        ]


def _with_lora(transformer: WanTransformer, path: Path | LoRASum) -> WanTransformer:
    config = lora_config(path, transformer.config)
    return with_adapter(transformer, config, load_lora_state(path, config))


# ---- reading -------------------------------------------------------------------------------------


def load_pipeline(
    path: str | Path,
    dtype: str = "float32",
    kind: str | None = None,
    rank: int = 0,
    alpha: float = 0.0,
    *,
    seed: int = 0,
    remat: str = "none",
    unroll: bool = False,
    mesh: Mesh | None = None,
    text_memory: str = "device",
    experts_idle: str = "device",
) -> Pipeline:
    """Read a pipeline: a diffusers folder, the original layout, or a store of `idgrpo-convert`.

    Args:
      path: the folder, or a name ORG/NAME on the Hugging Face Hub.
      dtype: "float32" or "bfloat16", of transformer and text encoder. Their parts that are
        sensitive to rounding and the VAE are always float32.
      kind: "vace", "wan", "phantom", "refalign" or "skyreels"; None takes it from the store, the
        class in `config.json` or the tensors. Phantom and RefAlign have the tensors of plain Wan, so
        outside a store their kind must be given.
      rank: if positive, add a new adapter of this rank. It changes no output until it is trained.
      alpha: of the new adapter.
      seed: of the new adapter.
      remat: as in `WanConfig`.
      unroll: as in `WanConfig`.
      mesh: as in `WanConfig`. Each tensor of the transformer is loaded directly to its sharding in
        `sharding.TABLE`, the text encoder is sharded over all devices, and the VAE is replicated.
      text_memory: memory of the text encoder while idle, "device" or "host"; needs a mesh.
      experts_idle: memory of the experts while they do not run, "device" or "host"; needs a mesh.
        A model with one transformer keeps it on the devices.

    Raises:
      UserError: the folder is not a pipeline of a supported layout, or its parts do not fit.
    """
    path = Path(path)
    path = checkpoint_place(path) if path.exists() or is_name(path) else path
    if kind not in (None, *identify.KINDS):
        raise UserError(
            f"{path}: kind {kind!r} is unknown; "
            f"choose {', '.join(identify.KINDS)} or leave kind out"
        )
    if not path.is_dir():
        remedy = f"give the folder that holds {INDEX}, or one of the original layout"
        raise UserError(f"{path}: no such folder; {remedy}")
    source = checkpoint.open_checkpoint(path, kind)
    if missing := source.missing():
        raise UserError(f"{path}: has no {', '.join(missing)}; give the folder of a whole pipeline")
    parts = ["transformer"] if source.boundary is None else ["transformer", experts.SECOND]
    memory = "device" if source.boundary is None else experts_idle
    transformers = [
        _load_transformer(
            source.networks[part], dtype, memory, remat=remat, unroll=unroll, mesh=mesh
        )
        for part in parts
    ]
    if rank:
        transformers = add_adapters(transformers, rank, alpha, rng.key(seed, "init"))
    assert source.kind is not None
    return Pipeline(
        transformer=transformers[0],
        vae=_load_vae(source.networks["vae"], mesh),
        text_encoder=_load_text_encoder(source.networks["text_encoder"], dtype, mesh, text_memory),
        tokenizer=load_tokenizer(path) if source.tokenizer else _embedded_tokenizer(source),
        shift=_shift(source),
        kind=source.kind,
        path=path,
        transformer_2=transformers[1] if len(transformers) > 1 else None,
        boundary=source.boundary,
    )


def _embedded_tokenizer(source: checkpoint.Checkpoint) -> ExtensibleTokenizer:
    """Read the tokenizer in the file of the text encoder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in source.tokenizer_texts.items():
            (Path(folder) / name).write_text(text, "utf-8")
        return read_tokenizer(Path(folder))


def load_transformer(path: str | Path, dtype: str = "float32", **run: Any) -> WanTransformer:
    """Read the transformer of a folder of any layout.

    Args:
      path: the folder.
      dtype: as in `load_pipeline`.
      **run: fields of `WanConfig` that no checkpoint contains: remat, unroll, mesh.

    Raises:
      UserError: the folder has no transformer, or two.
    """
    if checkpoint.boundary_of(path) is not None:
        raise UserError(
            f"{path}: has two transformers, and one is needed here; give the folder of one"
        )
    return _load_transformer(checkpoint.open_part(path, "transformer"), dtype, **run)


def load_vae(path: str | Path) -> WanVAE:
    """Read the VAE of a folder of any layout, float32."""
    return _load_vae(checkpoint.open_part(path, "vae"))


def load_text_encoder(path: str | Path, dtype: str = "float32") -> UMT5Encoder:
    """Read the text encoder of a folder of any layout."""
    return _load_text_encoder(checkpoint.open_part(path, "text_encoder"), dtype)


def _load_transformer(
    source: network.Network, dtype: str, memory: str = "device", **run: Any
) -> WanTransformer:
    config = dataclasses.replace(source.config, **run)
    return _fill(_transformer_shapes(config, dtype, memory), source)


def _load_vae(source: network.Network, mesh: Mesh | None = None) -> WanVAE:
    return _fill(_vae_shapes(source.config, mesh), source)


def _load_text_encoder(
    source: network.Network, dtype: str, mesh: Mesh | None = None, memory: str = "device"
) -> UMT5Encoder:
    return _fill(_text_encoder_shapes(source.config, dtype, mesh, memory), source)


def _transformer_shapes(config: WanConfig, dtype: str, memory: str = "device") -> WanTransformer:
    def shardings_of(state: nnx.State) -> nnx.State:
        shardings = sharding.state_shardings(config.mesh, state)
        if memory == "host":  # but the adapter, which is small, stays on the devices
            lora, base = nnx.split_state(shardings, LoRAParam, ...)
            shardings = nnx.merge_state(lora, sharding.in_host_memory(base))
        return shardings

    where = None if config.mesh is None else shardings_of
    return _shapes(
        lambda: WanTransformer(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0)), where
    )


def _vae_shapes(config: VAEConfig, mesh: Mesh | None = None) -> WanVAE:
    where = (
        None
        if mesh is None
        else functools.partial(jax.tree.map, lambda _: sharding.replicated(mesh))
    )
    return _shapes(lambda: WanVAE(config, rngs=nnx.Rngs(0)), where)


def _text_encoder_shapes(
    config: UMT5Config, dtype: str, mesh: Mesh | None = None, memory: str = "device"
) -> UMT5Encoder:
    def shardings_of(state: PyTree) -> PyTree:
        shardings = sharding.fully_shard(mesh, state)
        return sharding.in_host_memory(shardings) if memory == "host" else shardings

    return _shapes(
        lambda: UMT5Encoder(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0)),
        None if mesh is None else shardings_of,
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Configurations of a video model's networks.

    Attributes:
      transformer: of the transformer, or of both experts.
      vae: of the video autoencoder.
      text_encoder: of the prompt encoder.
      boundary: as in `Pipeline`.
    """

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    boundary: float | None = None


def read_architecture(path: str | Path) -> Architecture:
    """Read the architecture of a folder of any layout, without its tensors.

    Raises:
      UserError: a network is missing, or its configuration cannot be used.
    """
    transformer, vae_config, text_encoder = (
        checkpoint.open_part(path, part).config for part in ("transformer", "vae", "text_encoder")
    )
    return Architecture(transformer, vae_config, text_encoder, checkpoint.boundary_of(path))


def pipeline_shapes(
    architecture: Architecture,
    dtype: str,
    kind: str,
    *,
    mesh: Mesh | None = None,
    text_memory: str = "device",
    experts_idle: str = "device",
) -> Pipeline:
    """Build the pipeline of an architecture with shapes and shardings in place of arrays.

    Args:
      architecture: of the networks, the transformer's with rank, remat and unroll.
      dtype: as in `load_pipeline`.
      kind: as in `load_pipeline`.
      mesh: of the planned devices, which need not exist on this machine.
      text_memory: as in `load_pipeline`.
      experts_idle: as in `load_pipeline`.

    Returns:
      The pipeline, without tokenizer, path and schedule shift.
    """
    config, pair = dataclasses.replace(architecture.transformer, mesh=mesh), architecture.boundary
    memory = "device" if pair is None else experts_idle
    return Pipeline(
        transformer=_transformer_shapes(config, dtype, memory),
        transformer_2=None if pair is None else _transformer_shapes(config, dtype, memory),
        boundary=pair,
        vae=_vae_shapes(architecture.vae, mesh),
        text_encoder=_text_encoder_shapes(architecture.text_encoder, dtype, mesh, text_memory),
        tokenizer=None,
        shift=1.0,
        kind=kind,
        path=Path(),
    )


def _shift(source: checkpoint.Checkpoint) -> float:
    """Read the flow shift from the scheduler config.

    The original layout has no scheduler config; the shift is then the model kind's default.
    """
    if source.scheduler is None:
        if (source.path / INDEX).is_file():
            raise UserError(f"{source.path}: has no folder scheduler/; get the whole pipeline")
        return checkpoint.default_shift(source)
    file = source.scheduler / checkpoint.SCHEDULER_CONFIG
    shift = store.read_json(file).get("flow_shift")
    if not isinstance(shift, int | float) or shift <= 0:
        raise UserError(f"{file}: flow_shift is {shift!r}; it must be a positive number")
    return float(shift)


def _shapes(
    build: Callable[[], Network], where: Callable[[PyTree], PyTree] | None = None
) -> Network:
    """Evaluate `build` to a network of shapes.

    `where` maps shapes to their shardings; None is the default device.
    """
    built = nnx.eval_shape(build)
    if where is None:
        return built
    graph, abstract = nnx.split(built)
    return nnx.merge(graph, sharding.shapes(abstract, where(abstract)))


def _fill(shapes: Network, source: network.Network) -> Network:
    """Load the tensors of `source`; a host reads only the slices of its devices."""
    graph, abstract = nnx.split(shapes)
    return nnx.merge(graph, network.fill(source, abstract))


# ---- writing -------------------------------------------------------------------------------------


def save_pipeline(pipe: Pipeline, path: str | Path) -> None:
    """Write the diffusers folder in the arrays' dtypes, without an adapter (see `save_lora`).

    A folder at `path` is replaced if it is a pipeline or empty.
    """
    with store.atomic_path(path, INDEX) as new:
        save_vae(pipe.vae, new)
        save_text_encoder(pipe.text_encoder, pipe.tokenizer, new)
        if pipe.transformer_2 is not None:
            _save_velocity_network(pipe.transformer_2, new / experts.SECOND)
        save_transformer(pipe.transformer, new, pipe.shift)
        _write_index(new, pipe.boundary)


def save_transformer(transformer: WanTransformer, path: str | Path, shift: float) -> None:
    """Write `transformer/` and `scheduler/` into the pipeline folder `path`.

    Args:
      transformer: its adapter, if any, is left out.
      path: the pipeline folder.
      shift: of the schedule.
    """
    _save_velocity_network(transformer, Path(path) / "transformer")
    with store.atomic_path(Path(path) / "scheduler", "scheduler_config.json") as new:
        new.mkdir()
        store.write_json(new / "scheduler_config.json", wan.scheduler_to_json(shift))
    _write_index(Path(path))


def _save_velocity_network(transformer: WanTransformer, folder: Path) -> None:
    config, state = transformer.config, nnx.state(transformer, BASE)
    _save_network(folder, wan.config_to_json(config), wan.rules(config), state)


def save_vae(network: WanVAE, path: str | Path) -> None:
    """Write `vae/` into the pipeline folder `path`."""
    config = network.config
    _save_network(
        Path(path) / "vae", vae.config_to_json(config), vae.rules(config), nnx.state(network)
    )
    _write_index(Path(path))


def save_text_encoder(
    network: UMT5Encoder, tokenizer: ExtensibleTokenizer, path: str | Path
) -> None:
    """Write `text_encoder/` and `tokenizer/` into the pipeline folder `path`.

    Args:
      network: the text encoder.
      tokenizer: of transformers.
      path: the pipeline folder.
    """
    config, folder = network.config, Path(path) / "text_encoder"
    values = umt5.config_to_json(config) | {
        "dtype": str(leaves(nnx.state(network))["embedding"].dtype)
    }
    _save_network(folder, values, umt5.rules(config), nnx.state(network))
    with store.atomic_path(Path(path) / "tokenizer", "tokenizer_config.json") as new:
        tokenizer.save_pretrained(new)
    _write_index(Path(path))


def _save_network(
    folder: Path, config: Mapping[str, object], rules: Sequence[Rule], state: nnx.State
) -> None:
    with store.atomic_path(folder, "config.json") as new:
        new.mkdir()
        store.write_json(new / "config.json", config)
        store.write_file(
            new / f"{identify.FAMILIES[experts.family(folder.name)].weights}.safetensors",
            to_torch(rules, state),
        )


def _write_index(path: Path, boundary: float | None = None) -> None:
    """Write `model_index.json`: library and class of every part in the folder, and the boundary."""
    values: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": wan.DIFFUSERS_VERSION,
    }
    for part, (library, file, key) in PARTS.items():
        if (path / part).is_dir():
            name = store.read_json(path / part / file)[key]
            values[part] = [library, name[0] if isinstance(name, list) else name]
    if values.get("transformer", ["", ""])[1] == "WanVACETransformer3DModel":
        values["_class_name"] = "WanVACEPipeline"
    if boundary is not None:
        values["boundary_ratio"] = boundary
    store.write_json(path / INDEX, values)
