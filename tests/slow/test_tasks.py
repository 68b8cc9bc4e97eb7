"""Tasks text and transformer: the tokenizer, what their batches hold, and that their losses are the ones they claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.sampling.pipeline import load_pipeline
from jax_idgrpo.synthetic.training import transformer
from jax_idgrpo.training.task import make_task
from tests.helpers.tasks import make_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory)


def test_phantom_from_clips_to_a_stored_pipeline(config, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "CHUNK", 4)
    options = {**config.finetune.options, "pool_file": ""}
    del options["vace_layers"]
    phantom = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, kind="phantom"),
        finetune=dataclasses.replace(config.finetune, options=options),
    )
    task = make_task(phantom)
    network = task.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, task.batch(0, 0))
    value, _ = task.loss(network, batch, jax.random.key(0))
    assert np.isfinite(value)
    task.preview(network, tmp_path)
    assert (tmp_path / "clips.png").is_file()
    task.save(network, tmp_path / "out")
    stored = load_pipeline(tmp_path / "out", kind="phantom")
    assert stored.kind == "phantom"
    assert stored.transformer.config.vace is None


def test_from_clips_to_a_stored_pipeline(config, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "CHUNK", 4)
    task = make_task(config)
    batch = task.batch(0, 0)
    network = task.init(jax.random.key(0))
    value, metrics = task.loss(network, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    assert np.isfinite(value)
    assert set(metrics) == {"video_error"}

    monkeypatch.setattr(transformer, "build_pool", None)  # the second time it comes from its file
    again = make_task(config).batch(0, 0)
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])

    task.save(network, tmp_path / "out")
    pipe = load_pipeline(tmp_path / "out")
    assert pipe.shift == 3.0
    assert pipe.transformer.config.vace_layers == (0, 2)
    inputs = (
        jnp.ones((1, 4, 4, 4, 16)),
        jnp.array([500]),
        jnp.ones((1, 80, 16)),
        jnp.ones((1, 4, 4, 4, 96)),
    )
    np.testing.assert_array_equal(pipe.transformer(*inputs), network(*inputs))
