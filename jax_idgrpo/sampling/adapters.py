"""LoRA adapters of the transformer: made fresh, loaded and saved."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from checkpoints_convert import adapter, card, lora, store, wan
from checkpoints_convert.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints_convert.rules import to_jax, to_torch
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.wan import WanConfig, WanTransformer

BASE = nnx.Not(LoRAParam)

PROGRESS = "training_progress.json"
"""File of an exported adapter that holds its training step."""


# ---- adapters ------------------------------------------------------------------------------------


def with_adapter(
    transformer: WanTransformer, config: WanConfig, state: nnx.State
) -> WanTransformer:
    """The network of `config` made of the transformer's base arrays and the adapter `state`."""
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graph, nnx.state(transformer, BASE), state)


def add_adapter(
    transformer: WanTransformer, rank: int, alpha: float, key: Key[Array, ""]
) -> WanTransformer:
    """The transformer with a fresh adapter: A ~ N(0, 1/R^2), B = 0, so its output is unchanged."""
    config = dataclasses.replace(transformer.config, rank=rank, alpha=alpha)

    @jax.jit  # the compiler drops the base that nobody asked for
    def fresh(key: Key[Array, ""]) -> nnx.State:
        return nnx.state(
            WanTransformer(config, dtypes=transformer.dtypes, rngs=nnx.Rngs(params=key)), LoRAParam
        )

    return with_adapter(transformer, config, fresh(key))


def lora_scale(path: str | Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter: see `checkpoints_convert.adapter.adapter_scale`."""
    return adapter.adapter_scale(Path(path))


def load_lora_state(path: str | Path, config: WanConfig) -> nnx.State:
    """The adapter at `path` as the state of the LoRA leaves of `WanTransformer(config)`, float32.

    UserError when its rank or alpha is not the config's, or its tensors are not those of this transformer.
    """
    weights, _ = adapter.adapter_files(Path(path))
    rank, alpha = lora_scale(path)
    if (rank, alpha) != (config.rank, config.alpha):
        raise UserError(
            f"{path}: rank {rank}, alpha {alpha:g} where {config.rank}, {config.alpha:g} are set; make them equal"
        )
    tensors, _ = store.open_weights(weights)
    if (what := lora.misfit(tensors, config)) is not None:
        raise UserError(f"{weights}: {what}; pass an adapter of this model")
    model = nnx.eval_shape(
        lambda: WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    )
    return to_jax(
        lora.rules(wan.block_stacks(config), lora.prefix(tensors)),
        tensors,
        nnx.state(model, LoRAParam),
        str(weights),
    )


def save_lora(
    path: str | Path,
    state: nnx.State,
    config: WanConfig,
    training: dict[str, Any] | None = None,
    step: int | None = None,
) -> None:
    """Write LoRA leaves as a PEFT directory with a model card, which `peft` loads onto diffusers' transformer.

    A folder at `path` is replaced if it is an adapter or empty.

    Args:
      path: the folder.
      state: of `WanTransformer(config)`, LoRA leaves only.
      config: the transformer's, with rank and alpha.
      training: the configuration of the run, for the card.
      step: training steps done, which `saved_step` reads back; None for an adapter of no run.
    """
    base = (training or {}).get("model", {}).get("path") or None
    text = card.render(
        "peft", "LoRA adapter", base, card.LICENSE, training, (config.rank, config.alpha)
    )
    with store.atomic_path(path, ADAPTER_CONFIG) as new:
        new.mkdir()
        store.write_json(new / ADAPTER_CONFIG, lora.config_to_json(config.rank, config.alpha))
        store.write_file(
            new / ADAPTER_WEIGHTS, to_torch(lora.rules(wan.block_stacks(config)), state)
        )
        (new / card.FILE).write_text(text, "utf-8")
        if step is not None:
            store.write_json(new / PROGRESS, {"step": step})


def saved_step(path: str | Path) -> int | None:
    """Training steps of the adapter that a run wrote at `path`; None where there is no adapter, or it does not say."""
    file = Path(path) / PROGRESS
    return store.read_json(file).get("step") if file.is_file() else None
