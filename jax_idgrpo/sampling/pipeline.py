"""A video model as one object: transformer, VAE, text encoder, tokenizer. It is read from a folder of any layout that
`checkpoints_convert` knows and written to a diffusers folder:

    model_index.json  scheduler/  text_encoder/  tokenizer/  transformer/  vae/

Names and layouts are the tables of `checkpoints_convert`; nothing is cast but to the dtype policy asked for. Folders are
written under another name and renamed, so a reader sees a whole one or none.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from checkpoints_convert import checkpoint, identify, network, store, umt5, vae, wan
from checkpoints_convert.checkpoint import INDEX
from checkpoints_convert.places import checkpoint_place, hub_remedy
from checkpoints_convert.rules import Rule, leaves, to_torch
from jax_idgrpo import rng
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling.adapters import (
    BASE,
    add_adapter,
    load_lora_state,
    lora_scale,
    with_adapter,
)

Network = TypeVar("Network", bound=nnx.Module)

PARTS = {  # part -> library, and where its own files name the class
    "scheduler": ("diffusers", "scheduler_config.json", "_class_name"),
    "text_encoder": ("transformers", "config.json", "architectures"),
    "tokenizer": ("transformers", "tokenizer_config.json", "tokenizer_class"),
    "transformer": ("diffusers", "config.json", "_class_name"),
    "vae": ("diffusers", "config.json", "_class_name"),
}


@dataclasses.dataclass
class Pipeline:
    """The networks of one video model.

    tokenizer: of transformers; called with padding="max_length", max_length=L and truncation=True it keeps the final eos.
    shift: of the schedule, from the scheduler's `flow_shift`. kind: "vace", "wan" or "phantom". path: where it was read.
    """

    transformer: WanTransformer
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Any
    shift: float
    kind: str
    path: Path

    def load_lora(self, path: str | Path) -> None:
        """Give the transformer the adapter at `path`, in place of one it may have; the base arrays are shared.

        path: a PEFT directory, the workdir of a run, or a file of weights (names with or without `base_model.model.` or `transformer.`).
        UserError for an adapter of another model or of an unsupported kind.
        """
        rank, alpha = lora_scale(path)
        config = dataclasses.replace(self.transformer.config, rank=rank, alpha=alpha)
        self.transformer = with_adapter(self.transformer, config, load_lora_state(path, config))


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
) -> Pipeline:
    """Read a diffusers folder, a folder of the original layout, or the store that `idgrpo-convert import` makes of either.

    dtype: "float32" or "bfloat16" for transformer and text encoder (their sensitive parts stay float32); the VAE is float32.
    kind: None takes it from the store or the transformer; Phantom has plain Wan's tensors, so "phantom" must be said.
    rank, alpha: rank > 0 adds a fresh adapter drawn from `seed`, which changes nothing until trained.
    remat, unroll, mesh: as in `WanConfig`; on a mesh every tensor of the transformer goes straight to where `parallel.TABLE` puts it,
    the text encoder is spread over all devices, and the VAE lies on each. text_memory: on a mesh, where the text encoder lies while
    it is not used, "device" or "host".

    Raises:
      UserError: the folder is not such a pipeline or does not fit.
    """
    path = checkpoint_place(path) if Path(path).exists() else Path(path)
    if kind not in (None, *identify.KINDS):
        raise UserError(
            f"{path}: kind {kind!r} is unknown; choose {', '.join(identify.KINDS)} or leave kind out"
        )
    if not path.is_dir():
        remedy = (
            hub_remedy(path) or f"give the folder that holds {INDEX}, or one of the original layout"
        )
        raise UserError(f"{path}: no such folder; {remedy}")
    found = checkpoint.open_checkpoint(path, kind)
    if missing := found.missing():
        raise UserError(f"{path}: has no {', '.join(missing)}; give the folder of a whole pipeline")
    transformer = _load_transformer(
        found.networks["transformer"], dtype, remat=remat, unroll=unroll, mesh=mesh
    )
    if rank:
        transformer = add_adapter(transformer, rank, alpha, rng.key(seed, "init"))
    assert found.tokenizer is not None and found.kind is not None
    return Pipeline(
        transformer=transformer,
        vae=_load_vae(found.networks["vae"], mesh),
        text_encoder=_load_text_encoder(found.networks["text_encoder"], dtype, mesh, text_memory),
        tokenizer=load_tokenizer(path),
        shift=_shift(found),
        kind=found.kind,
        path=path,
    )


def load_transformer(path: str | Path, dtype: str = "float32", **run: Any) -> WanTransformer:
    """The transformer of a folder of any layout; `run` are the fields of `WanConfig` that no checkpoint holds: remat, unroll, mesh."""
    return _load_transformer(checkpoint.open_part(path, "transformer"), dtype, **run)


def load_vae(path: str | Path) -> WanVAE:
    """The VAE of a folder of any layout, float32."""
    return _load_vae(checkpoint.open_part(path, "vae"))


def load_text_encoder(path: str | Path, dtype: str = "float32") -> UMT5Encoder:
    """The text encoder of a folder of any layout."""
    return _load_text_encoder(checkpoint.open_part(path, "text_encoder"), dtype)


def _load_transformer(found: network.Network, dtype: str, **run: Any) -> WanTransformer:
    return _fill(_transformer_shapes(dataclasses.replace(found.config, **run), dtype), found)


def _load_vae(found: network.Network, mesh: Mesh | None = None) -> WanVAE:
    return _fill(_vae_shapes(found.config, mesh), found)


def _load_text_encoder(
    found: network.Network, dtype: str, mesh: Mesh | None = None, memory: str = "device"
) -> UMT5Encoder:
    return _fill(_text_encoder_shapes(found.config, dtype, mesh, memory), found)


def _transformer_shapes(config: WanConfig, dtype: str) -> WanTransformer:
    where = (
        None if config.mesh is None else functools.partial(sharding.state_shardings, config.mesh)
    )
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
    def spread(state: Any) -> Any:
        shardings = sharding.fully_shard(mesh, state)
        return sharding.in_host_memory(shardings) if memory == "host" else shardings

    return _shapes(
        lambda: UMT5Encoder(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0)),
        None if mesh is None else spread,
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Configurations of a video model's networks."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of a folder of any layout; no tensor is read.

    Raises:
      UserError: a network is missing, or its configuration cannot be used.
    """
    parts = (
        checkpoint.open_part(path, part).config for part in ("transformer", "vae", "text_encoder")
    )
    return Architecture(*parts)


def pipeline_shapes(
    architecture: Architecture,
    dtype: str,
    kind: str,
    *,
    mesh: Mesh | None = None,
    text_memory: str = "device",
) -> Pipeline:
    """The pipeline that `load_pipeline` makes of a checkpoint of this architecture, of shapes with shardings in place of arrays.

    Args:
      architecture: its transformer has the adapter's rank and how it is run.
      dtype, kind, text_memory: as in `load_pipeline`.
      mesh: of the planned devices, which need not exist here.

    Returns:
      The networks; it has no tokenizer, path or schedule of its own.
    """
    return Pipeline(
        transformer=_transformer_shapes(
            dataclasses.replace(architecture.transformer, mesh=mesh), dtype
        ),
        vae=_vae_shapes(architecture.vae, mesh),
        text_encoder=_text_encoder_shapes(architecture.text_encoder, dtype, mesh, text_memory),
        tokenizer=None,
        shift=1.0,
        kind=kind,
        path=Path(),
    )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder of any layout; nothing is fetched."""
    folder = checkpoint.tokenizer_folder(Path(path))
    if folder is None:
        raise UserError(f"{path}: has no tokenizer; get the whole pipeline")
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer whose files lie in `folder`; nothing is fetched."""
    from transformers import AutoTokenizer  # seconds to import

    for file in (
        "tokenizer_config.json",
        "tokenizer.json",
    ):  # without the second the library may make one up
        store.read_json(folder / file)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers do
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: transformers cannot read this tokenizer ({reason}); get the folder again"
        ) from error


def _shift(found: checkpoint.Checkpoint) -> float:
    """Of the scheduler's file, or, in the original layout, which has none, of the kind."""
    if found.scheduler is None:
        if (found.path / INDEX).is_file():
            raise UserError(f"{found.path}: has no folder scheduler/; get the whole pipeline")
        return checkpoint.SHIFTS[str(found.kind)]
    file = found.scheduler / checkpoint.SCHEDULER_CONFIG
    shift = store.read_json(file).get("flow_shift")
    if not isinstance(shift, int | float) or shift <= 0:
        raise UserError(f"{file}: flow_shift is {shift!r}; it must be a positive number")
    return float(shift)


def _shapes(build: Callable[[], Network], where: Callable[[Any], Any] | None = None) -> Network:
    """The network that `build` makes, of shapes. where: shapes -> their shardings; None is the default device."""
    made = nnx.eval_shape(build)
    if where is None:
        return made
    graph, abstract = nnx.split(made)
    return nnx.merge(graph, sharding.shapes(abstract, where(abstract)))


def _fill(shapes: Network, found: network.Network) -> Network:
    """The network of shapes with the tensors of `found`; a host reads only the slices that its devices hold."""
    graph, abstract = nnx.split(shapes)
    return nnx.merge(graph, network.fill(found, abstract))


# ---- writing -------------------------------------------------------------------------------------


def save_pipeline(pipe: Pipeline, path: str | Path) -> None:
    """Write the diffusers folder, dtypes kept; the adapter, if any, is left out (see `save_lora`).

    A folder at `path` is replaced if it is a pipeline or empty.
    """
    with store.atomic_path(path, INDEX) as new:
        save_vae(pipe.vae, new)
        save_text_encoder(pipe.text_encoder, pipe.tokenizer, new)
        save_transformer(pipe.transformer, new, pipe.shift)


def save_transformer(transformer: WanTransformer, path: str | Path, shift: float) -> None:
    """Write `transformer/` and `scheduler/` into the pipeline folder `path`."""
    config, state = transformer.config, nnx.state(transformer, BASE)
    _save_network(Path(path) / "transformer", wan.config_to_json(config), wan.rules(config), state)
    with store.atomic_path(Path(path) / "scheduler", "scheduler_config.json") as new:
        new.mkdir()
        store.write_json(new / "scheduler_config.json", wan.scheduler_to_json(shift))
    _write_index(Path(path))


def save_vae(network: WanVAE, path: str | Path) -> None:
    """Write `vae/` into the pipeline folder `path`."""
    config = network.config
    _save_network(
        Path(path) / "vae", vae.config_to_json(config), vae.rules(config), nnx.state(network)
    )
    _write_index(Path(path))


def save_text_encoder(network: UMT5Encoder, tokenizer: Any, path: str | Path) -> None:
    """Write `text_encoder/` and `tokenizer/` into the pipeline folder `path`."""
    config, folder = network.config, Path(path) / "text_encoder"
    values = umt5.config_to_json(config) | {
        "dtype": str(leaves(nnx.state(network))["embedding"].dtype)
    }
    _save_network(folder, values, umt5.rules(config), nnx.state(network))
    with store.atomic_path(Path(path) / "tokenizer", "tokenizer_config.json") as new:
        tokenizer.save_pretrained(new)
    _write_index(Path(path))


def _save_network(
    folder: Path, config: dict[str, Any], rules: Sequence[Rule], state: nnx.State
) -> None:
    with store.atomic_path(folder, "config.json") as new:
        new.mkdir()
        store.write_json(new / "config.json", config)
        store.write_file(
            new / f"{identify.FAMILIES[folder.name].weights}.safetensors", to_torch(rules, state)
        )


def _write_index(path: Path) -> None:
    """`model_index.json`: the library and class of every part that the folder holds so far."""
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
    store.write_json(path / INDEX, values)
