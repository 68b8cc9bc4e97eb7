"""The task `adapter` on the bundled model, and pools of videos whose pairs it trains on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_idgrpo.evaluation.scoring import JUDGED
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.preferences import adapter_batches, pool, train_adapter
from jax_idgrpo.preferences.adapter_rows import read_options, read_rows_of
from jax_idgrpo.preferences.csv_source import load_pairs
from jax_idgrpo.training import setup
from jax_idgrpo.training.finetune import finetune
from tests.helpers.adapter_runs import adapter_config, make_checkpoint, write_clips
from tests.helpers.tiny_run import assert_same_adapter
from tests.helpers.tiny_run import rows as metrics_of


def test_a_pool_of_models_clips_and_stills_gives_pairs_for_dpo(tmp_path):
    prompts = tmp_path / "clips" / "clips.csv"
    write_clips(prompts.parent)
    checkpoint = make_checkpoint(tmp_path / "pipeline", "vace")
    config = adapter_config(checkpoint, "vace", {"clips": str(prompts)})
    finetune(config, tmp_path / "run")
    rows = prompts.read_text().splitlines()
    prompts.write_text("\n".join(rows[:3]))
    models = {"base": None, "tuned": tmp_path / "run" / "export"}
    rule = pool.Rule({"motion": -1.0}, {})
    out = tmp_path / "pool"
    for _ in range(2):  # an interrupted command continues
        pool.make_pool(config, prompts, out, models, prompts, True, rule)
    lines = [json.loads(line) for line in (out / "pool.jsonl").read_text().splitlines()]
    assert sorted((line["source"], line["prompt"]) for line in lines) == [
        *(("base", n) for n in range(2)),
        *(("clip", n) for n in range(2)),
        ("still", 0),  # the prompt with one person
        *(("tuned", n) for n in range(2)),
    ]
    assert all({"reward", "embedder_identity", *JUDGED} <= set(line) for line in lines)
    motion = {line["file"]: line["motion"] for line in lines}
    assert motion["videos/still/0000-0.mp4"] < 0.003  # h264 is lossy
    options = {"pairs": str(out / "pairs.csv"), "loss": "dpo"}
    pairs = read_rows_of(read_options(options), 3).pairs
    assert len(pairs) == 2
    for winner, loser in pairs:
        names = [video.path.resolve().relative_to(out).as_posix() for video in (winner, loser)]
        assert motion[names[0]] < motion[names[1]]
    assert pairs[0][0].path.parent.name == "still"
    assert len(load_pairs(out / "pairs.csv", ("SA",))) == 2


def test_the_bundled_model_trains_with_augmented_photos_and_face_weights(tmp_path):
    clips = tmp_path / "clips"
    write_clips(clips)
    recipe = adapter_config("embedded", "vace", {"clips": str(clips), "augment": True,
                            "face_weight": 3.0, "split": "all"})  # fmt: skip
    run = dataclasses.replace(recipe.run, sample_every=2)
    finetune(dataclasses.replace(recipe, run=run), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "000002" / "clips.png").is_file()
    assert np.isfinite(metrics_of(tmp_path / "run")[-1]["loss"])
    pipe = setup.load(recipe)
    options = read_options(recipe.finetune.options)
    rows = adapter_batches.prepare_rows(
        pipe, recipe, options, read_rows_of(options, 3), tmp_path / "run" / "latents"
    )
    weights = np.stack(
        [
            adapter_batches.read_row(rows, recipe, options, item[0], None).weight
            for item in rows.items
        ]
    )
    assert weights.min() == 1
    assert 2 < weights.max() <= 3 + 1e-2
    assert (weights.max(axis=(1, 2, 3)) > 2).mean() >= 0.75  # faces are found in most clips


def test_the_identity_loss_of_faces_falls_and_a_run_with_it_resumes(tmp_path):
    """Descending it through the decoder and the face networks raises the reward of a fixed batch."""
    clips = tmp_path / "clips"
    write_clips(clips)
    checkpoint = make_checkpoint(tmp_path / "pipeline", "vace")
    options = {"clips": str(clips), "photo_dropout": 0, "identity_weight": 3, "split": "all"}
    for folder, lengths in (("whole", [2]), ("resumed", [1, 2])):
        for steps in lengths:
            config = adapter_config(checkpoint, "vace", options, steps=steps, batch=4)
            sampling = dataclasses.replace(config.rollout, shift=1.0)
            config = dataclasses.replace(config, rollout=sampling)
            finetune(config, tmp_path / folder)
    assert_same_adapter(tmp_path / "whole", tmp_path / "resumed")
    for row in metrics_of(tmp_path / "whole"):
        assert 0.25 <= row["identity_rows"] <= 0.5
        assert 0 < row["identity_loss"] < 2 * row["identity_rows"]
        assert row["loss"] > 3 * row["identity_loss"]

    task = train_adapter.make(config)
    task.prepare(tmp_path)
    network = task.init(jax.random.key(0))
    fixed, batch = task.fixed(network), jax.tree.map(jnp.asarray, task.batch(0, 0))
    graph, lora, base = nnx.split(network, LoRAParam, ...)

    @jax.jit
    @jax.value_and_grad
    def identity(lora, base, fixed):
        network = nnx.merge(graph, lora, base)
        return task.loss(network, batch, jax.random.key(1), fixed)[1]["identity_loss"]

    losses = []
    for _ in range(8):
        value, gradient = identity(lora, base, fixed)
        losses.append(float(value))
        norm = optax.global_norm(gradient)
        assert 0 < float(norm) < np.inf
        lora = jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope / norm, lora, gradient)
    assert losses[-1] < losses[0] - 0.002
