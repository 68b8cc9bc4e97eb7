"""The whole loop on the embedded models, small: files, exact resume, refusals."""

import dataclasses

import numpy as np
import pytest

from checkpoints_convert import adapter as adapter_file
from checkpoints_convert import lora_names, store
from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.training import train
from tests.helpers.tiny_run import adapter, assert_same_adapter, failing, rows, tiny

VELOCITY = dict(kl=1e-3, kl_units="velocity")
RECIPES = {
    "cps, a step per prompt, two updates in two epochs": (
        dict(
            grpo=dict(**VELOCITY, updates=2, epochs=2, time_weights=True),
            sampler="cps",
            window="per_prompt",
        ),
        ("ratio_min_last", "approx_kl"),
    ),
    "guard, best and worst": (
        dict(
            grpo=dict(objective="guard", best=1, worst=1, drop_constant=True),
            group=3,
            micro_batch=2,
        ),
        ("ratio_min",),
    ),
    "nft": (dict(grpo=dict(**VELOCITY, objective="nft"), window="none"), ()),
    "awm, off-policy": (
        dict(grpo=dict(**VELOCITY, objective="awm", clip=0.5, updates=2), window="none"),
        ("ratio_min_last",),
    ),
    "dpo": (
        dict(grpo=dict(**VELOCITY, objective="dpo", best=1, worst=1), window="none", guidance=2.0),
        (),
    ),
    "dpo by dominance": (
        dict(
            grpo=dict(
                **VELOCITY,
                objective="dpo",
                best=1,
                worst=1,
                pairs="dominance",
                pair_terms={"reward": 1, "motion": 0.5},
                pair_slack={"motion": 9},
            ),
            window="none",
        ),
        ("pairs_used", "pair_gap", "pair_motion"),
    ),
    "gradient of the reward": (
        dict(grpo=dict(**VELOCITY, objective="reward_gradient", gradient_steps=2), window="none"),
        (),
    ),
    "sft on the best": (
        dict(grpo=dict(**VELOCITY, objective="sft", best=1), window="none", micro_batch=2),
        (),
    ),
}


def test_a_curriculum_and_terms_across_prompts_continue_exactly(tmp_path):
    config = dataclasses.replace(
        tiny(4),
        data=c.DataConfig(max_people=3, text_length=80, curriculum={"people": 1, "steps": 3}),
        reward=c.RewardConfig(frames=2, mixture={"recognised_log": 1.0}),
    )
    stopped = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))
    train.train(config, tmp_path / "whole")
    train.train(stopped, tmp_path / "again")
    train.train(config, tmp_path / "again")
    assert_same_adapter(tmp_path / "whole", tmp_path / "again")
    logged = rows(tmp_path / "again")
    assert [row["curriculum"] for row in logged] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [row["people"] for row in logged[:1]] == [1]
    for row, other in zip(logged, rows(tmp_path / "whole"), strict=True):
        assert row["recognised_log"] == other["recognised_log"] < 0
        assert row["skipped"] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_in_the_same_loop(recipe, tmp_path):
    values, logged = RECIPES[recipe]
    config = tiny(2, **values)
    exact = dataclasses.replace(
        config.model, remat="full"
    )  # without, a ratio may be a unit in the last place off, by CPU
    train.train(dataclasses.replace(config, model=exact), tmp_path)
    for row in rows(tmp_path):
        assert row["skipped"] == 0
        assert row["gradient_norm"] > 0
        assert np.isfinite(row["policy_loss"])
        assert row["kl"] >= 0
        assert row.get("ratio_min", 1) == row.get("ratio_max", 1) == 1
        assert all(np.isfinite(row[name]) for name in logged)
    tensors = adapter(tmp_path)
    assert max(np.abs(tensor).max() for name, tensor in tensors.items() if "lora_B" in name) > 0


def test_a_reward_that_is_no_number_costs_one_video_and_the_same_one_after_a_resume(
    monkeypatch, tmp_path
):
    calls = failing(monkeypatch, lambda call: np.arange(4) == (1 if call == 3 else -1))
    train.train(tiny(4), tmp_path / "whole")
    calls.clear()
    train.train(tiny(2), tmp_path / "stopped")
    train.train(tiny(4), tmp_path / "stopped")
    assert [row["rewards_failed"] for row in rows(tmp_path / "whole")] == [0, 0, 1, 0]
    assert all(row["skipped"] == 0 for row in rows(tmp_path / "whole"))
    assert_same_adapter(tmp_path / "whole", tmp_path / "stopped")


def style_lora(file, config):
    """Write a small LoRA in kohya's form for the feed-forward layers of the main blocks."""
    rng, tensors = np.random.default_rng(3), {}
    for layer in lora_names.layers(config):
        if layer.leaf.startswith("blocks.ffn"):
            name = f"lora_unet_{layer.spelled(lora_names.ORIGINAL).replace('.', '_')}"
            inputs, outputs = lora_names.shape(layer, config)
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, inputs)) / inputs
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((outputs, 2))
    store.write_file(file, {name: value.astype(np.float32) for name, value in tensors.items()})
    return file


def test_chosen_layers_are_trained_on_a_merged_base_and_resumed(tmp_path):
    """Every layer keeps its rank, and the merged files belong to the run."""
    first = tiny(2)
    wan = pipeline.read_architecture(first.model.folder()).transformer
    style = style_lora(tmp_path / "style.safetensors", wan)
    model = dataclasses.replace(
        first.model,
        lora_targets="to_q,ffn.*,proj_in",
        lora_ranks={"blocks.0.*": 1, "ffn.0": 3},
        lora_alphas={"ffn.*": 2.0},
        base_loras={str(style): 0.5},
        remat="full",
    )
    for name, steps in (("whole", (3,)), ("stopped", (2, 3))):
        for count in steps:
            train.train(dataclasses.replace(tiny(count), model=model), tmp_path / name)
    assert_same_adapter(tmp_path / "whole", tmp_path / "stopped")
    assert all(row["ratio_min"] == row["ratio_max"] == 1 for row in rows(tmp_path / "whole"))
    scales = adapter_file.open_adapter(tmp_path / "whole").config
    assert {layer.name: tuple(scale) for layer, scale in scales.items()}[
        "blocks.0.ffn.linear_1"
    ] == (1, 2.0)
    assert {scale.rank for scale in scales.values()} == {1, 3, model.rank}
    changed = adapter(tmp_path / "whole")
    assert all(np.any(tensor) for name, tensor in changed.items() if "lora_B" in name)
    plain = dataclasses.replace(model, base_loras={})
    with pytest.raises(UserError, match="base_loras"):
        train.train(dataclasses.replace(tiny(4), model=plain), tmp_path / "whole")
    tensors = {name: np.array(tensor) for name, tensor in store.open_tensors(style).items()}
    store.write_file(style, {name: 2 * tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"style\.safetensors, which is merged into the base"):
        train.train(dataclasses.replace(tiny(4), model=model), tmp_path / "whole")
