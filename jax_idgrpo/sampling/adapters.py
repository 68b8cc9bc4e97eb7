"""Initialise, load and save LoRA adapters of the transformer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx
from jaxtyping import Array, Key

from checkpoints_convert import adapter, card, lora, store
from checkpoints_convert.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints_convert.places import LoRASum
from checkpoints_convert.rules import to_jax, to_torch
from jax_idgrpo import rng
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.experts import NAMES, Pair, each
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.lora import LayerLoRA
from jax_idgrpo.models.wan import WanConfig, WanTransformer
from jax_idgrpo.sampling.lora_sum import read_adapter

BASE = nnx.Not(LoRAParam)

PROGRESS = "training_progress.json"  # file of an exported adapter with its training step


def with_adapter(
    transformer: WanTransformer, config: WanConfig, state: nnx.State
) -> WanTransformer:
    """Build the network of `config` from the transformer's base arrays and an adapter.

    Args:
      transformer: supplies the base arrays, which are shared, and the dtypes.
      config: with the adapter's rank and alpha.
      state: LoRA leaves.
    """
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graph, nnx.state(transformer, BASE), state)


def add_adapter(
    transformer: WanTransformer,
    rank: int,
    alpha: float,
    key: Key[Array, ""],
    layers: tuple[LayerLoRA, ...] | None = None,
) -> WanTransformer:
    """Return the transformer with a new adapter: A ~ N(0, 1/R^2), B = 0, so its output is the same.

    Args:
      transformer: supplies the base arrays, which are shared.
      rank: R.
      alpha: the adapter is scaled by alpha / R.
      key: for A.
      layers: the layers, with ranks and alphas of their own, as in `WanConfig.lora`.
    """
    config = dataclasses.replace(transformer.config, rank=rank, alpha=alpha, lora=layers)

    @jax.jit  # the compiler removes the unused initialisation of the base
    def fresh(key: Key[Array, ""]) -> nnx.State:
        return nnx.state(
            WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(params=key)), LoRAParam
        )

    return with_adapter(transformer, config, fresh(key))


def add_adapters(
    transformers: Sequence[WanTransformer],
    rank: int,
    alpha: float,
    key: Key[Array, ""],
    layers: tuple[LayerLoRA, ...] | None = None,
) -> list[WanTransformer]:
    """Add a new adapter to every expert; that of the first one is independent of their number.

    Args:
      transformers: one, or the experts for high and low noise.
      rank: as in `add_adapter`.
      alpha: as in `add_adapter`.
      key: as in `add_adapter`.
      layers: as in `add_adapter`.
    """
    keys = [key, *(rng.fold(key, expert) for expert in range(1, len(transformers)))]
    return [
        add_adapter(transformer, rank, alpha, own, layers)
        for transformer, own in zip(transformers, keys, strict=True)
    ]


def lora_scale(path: str | Path) -> tuple[int, float]:
    """Read (rank, alpha) of an adapter: see `checkpoints_convert.adapter.adapter_scale`."""
    return adapter.adapter_scale(Path(path))


def lora_config(path: str | Path | LoRASum, config: WanConfig) -> WanConfig:
    """Return `config` with the layers, ranks and alphas of an adapter or a sum of adapters.

    Raises:
      UserError: the adapter cannot be read, or is made for another transformer.
    """
    scales, _ = read_adapter(Path(path) if isinstance(path, str) else path, config)
    return dataclasses.replace(config, **lora.fields(scales, config))


def load_lora_state(path: str | Path | LoRASum, config: WanConfig) -> nnx.State:
    """Read an adapter or a sum of adapters as the LoRA leaves of `WanTransformer(config)`, float32.

    Raises:
      UserError: its layers, ranks or alphas differ from the config's, or its tensors are not those
        of this transformer.
    """
    found, matrices = read_adapter(Path(path) if isinstance(path, str) else path, config)
    if found != (wanted := lora.scales_of(config)):
        (rank, alpha), (other, another) = lora.common(found), lora.common(wanted)
        raise UserError(
            f"{path}: rank {rank}, alpha {alpha:g} where {other}, {another:g} are set, or other "
            "layers; make them equal"
        )
    model = nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    )
    tensors = lora.padded(matrices, config)
    return to_jax(lora.rules(config), tensors, nnx.state(model, LoRAParam), str(path))


def save_lora(
    path: str | Path,
    state: nnx.State | Pair[nnx.State],
    config: WanConfig,
    training: Mapping[str, Mapping[str, object]] | None = None,
    step: int | None = None,
) -> None:
    """Write LoRA leaves as a PEFT directory with a model card.

    `peft` loads the directory onto diffusers' transformer. A folder at `path` is replaced if it is
    an adapter or empty. For two experts, it holds the directories high_noise and low_noise.

    Args:
      path: the folder, which appears complete or not at all.
      state: LoRA leaves of `WanTransformer(config)`, of both experts if there are two.
      config: of the transformer, with rank and alpha.
      training: configuration of the run, for the card.
      step: completed training steps, which `saved_step` reads; None if no run trained the adapter.
    """
    parts = each(state)
    if len(parts) == 1:
        _save_one(path, parts[0], config, training, step)
        return
    with store.atomic_path(path, f"{NAMES[0]}/{ADAPTER_CONFIG}") as new:
        new.mkdir()
        for name, part in zip(NAMES, parts, strict=True):
            _save_one(new / name, part, config, training, step)
        if step is not None:
            store.write_json(new / PROGRESS, {"step": step})


def _save_one(
    path: str | Path,
    state: nnx.State,
    config: WanConfig,
    training: Mapping[str, Mapping[str, object]] | None,
    step: int | None,
) -> None:
    path_of_base = (training or {}).get("model", {}).get("path")
    base = str(path_of_base) if path_of_base else None
    text = card.render(
        "peft", "LoRA adapter", base, card.LICENSE, training, (config.rank, config.alpha)
    )
    scales = lora.scales_of(config)
    with store.atomic_path(path, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, lora.config_to_json(scales))
        store.write_file(
            new / ADAPTER_WEIGHTS, lora.cut(to_torch(lora.rules(config), state), scales)
        )
        (new / card.FILE).write_text(text, "utf-8")
        if step is not None:
            store.write_json(new / PROGRESS, {"step": step})


def saved_step(path: str | Path) -> int | None:
    """Read the training steps of the adapter at `path`; None if none are recorded."""
    file = Path(path) / PROGRESS
    return store.read_json(file).get("step") if file.is_file() else None
