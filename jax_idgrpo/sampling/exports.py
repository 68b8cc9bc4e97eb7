"""Write the complete checkpoint of a run that trains the transformer's weights."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
from flax import nnx

from checkpoints_convert import card, store
from checkpoints_convert.checkpoint import INDEX
from checkpoints_convert.writing import PIPELINE_CLASSES
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.sampling.adapters import PROGRESS
from jax_idgrpo.sampling.pipeline import (
    Pipeline,
    save_text_encoder,
    save_transformer,
    save_vae,
)

Network = TypeVar("Network", bound=nnx.Module)

UNCHANGED = ("vae", "text_encoder", "tokenizer")  # parts that no run trains


def save_checkpoint(
    path: str | Path,
    pipe: Pipeline,
    state: nnx.State,
    training: Mapping[str, Mapping[str, object]],
    step: int,
    reuse: bool,
) -> None:
    """Write a diffusers folder with trained weights and a model card (collective).

    The folder replaces an earlier one at once. Networks are gathered leaf by leaf.

    Args:
      path: the folder.
      pipe: the other parts, and the transformer's structure.
      state: weights of the transformer.
      training: configuration of the run, for the card.
      step: completed training steps, which `adapters.saved_step` reads.
      reuse: link the unchanged parts from the folder that is replaced, instead of writing them.
    """
    path = Path(path)
    transformer = _on_host(pipe.transformer, state)
    encoder = pipe.text_encoder
    parts = None if reuse else (_on_host(pipe.vae), _on_host(sharding.on_devices(encoder)))
    if jax.process_index() != 0:
        return
    base = str(training["model"]["path"])
    text = card.render(
        "diffusers",
        "Fine-tuned video model",
        base,
        card.LICENSE,
        training,
        pipeline=PIPELINE_CLASSES[pipe.kind],
    )
    with store.atomic_path(path, INDEX) as new:
        new.mkdir()
        if parts is None:
            for part in UNCHANGED:
                shutil.copytree(path / part, new / part, copy_function=_link)
        else:
            save_vae(parts[0], new)
            save_text_encoder(parts[1], pipe.tokenizer, new)
        save_transformer(transformer, new, pipe.shift)
        (new / card.FILE).write_text(text, "utf-8")
        store.write_json(new / PROGRESS, {"step": step})


def _on_host(network: Network, state: nnx.State | None = None) -> Network:
    """Copy a network to the host, with another state if one is given (collective)."""
    graph, own = nnx.split(network)
    return nnx.merge(graph, jax.tree.map(to_host, own if state is None else state))


def _link(source: str, target: str) -> None:
    """Link a file that is never changed in place; copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
