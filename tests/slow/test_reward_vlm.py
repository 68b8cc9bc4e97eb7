"""Training of the vision-language reward: what moves and what does not, resume, pairs of a CSV, and pairs of known truth."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.preferences import batches as pairs_tasks
from jax_idgrpo.preferences import train_vlm
from jax_idgrpo.preferences.csv_source import (
    load_pairs,
)
from jax_idgrpo.rewards.vlm import files
from tests.helpers.vlm_pairs import configuration, make_base, write_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory)


def test_what_is_trained_moves_and_the_rest_does_not(base, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 3, 0)
    config = configuration(base, pairs, 2, held_out=pairs)
    from jax_idgrpo.training.finetune import finetune

    finetune(config, tmp_path / "run")
    options = pairs_tasks.read_options(train_vlm.Options, config.finetune.options)
    from jax_idgrpo import rng

    before, text = train_vlm.open_model(config, options, rng.key(config.run.seed, "init"))
    after = files.load(tmp_path / "run" / "export", base, "float32", merge=False)
    assert (tmp_path / "run" / "export" / "prompt.txt").read_text() == text
    assert after.settings.template == "own"
    old, new = (nnx.state(model.network) for model in (before, after))
    table = [np.asarray(model.network.embed_tokens[...]) for model in (before, after)]
    np.testing.assert_array_equal(table[0][:-1], table[1][:-1])
    assert np.abs(table[0][-1] - table[1][-1]).max() > 0
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(old)[0], jax.tree.leaves(new), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "visual" in name or "rm_head" in name or "lora" in name:
            assert np.any(np.asarray(a) != np.asarray(b)), name
        elif "embed_tokens" not in name:
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert len(jax.tree.leaves(nnx.state(after.network, LoRAParam))) == 14
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    assert found["pairs"] == 3
    assert found["ties"] == 0
    assert 0 <= found["without_ties"]["mean"] <= 1


def test_it_learns_64_pairs_by_heart_and_tells_held_out_ones_apart(base, tmp_path):
    pairs, held_out = (
        write_pairs(tmp_path / "pairs", 64, 0),
        write_pairs(tmp_path / "held_out", 64, 1000),
    )
    config = configuration(base, pairs, 48, held_out=held_out, batch=8, rate=2e-3, pixels=20_000)
    from jax_idgrpo.training.finetune import finetune

    finetune(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]
    model = files.load(tmp_path / "run" / "export", base, "float32")
    text = (tmp_path / "run" / "export" / "prompt.txt").read_text()
    listed = load_pairs(pairs, ("SA",))
    difference = train_vlm.differences(
        train_vlm.Trainee(model.network, 1, model.settings),
        listed,
        train_vlm.read_with(model, text, 10.0),
        8,
    )[:, 0]
    labels = np.array([pair.labels[0] for pair in listed])
    print(found, np.mean(difference * labels > 0))
    assert np.mean(difference * labels > 0) == 1.0
    assert found["pairs"] == 64
    assert found["without_ties"]["low"] > 0.75
