"""Checkpoints with two experts in both layouts, their schedule and their windows."""

import dataclasses
import shutil

import numpy as np
import pytest

import jax_idgrpo as idg
from checkpoints_convert import experts, store
from checkpoints_convert.__main__ import run
from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import pipeline, rollout
from tests.helpers.experts import BOUNDARY, two_experts

PARTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_experts(tmp_path_factory.mktemp("experts") / "m")


def test_both_layouts_round_trip_bit_for_bit(folder, tmp_path, capsys):
    for source, form, out in (
        (folder, None, "store"),
        ("store", "original", "original"),
        ("original", None, "again"),
        ("again", "diffusers", "diffusers"),
    ):
        words = ("import",) if form is None else ("export",)
        options = () if form is None else ("--format", form)
        assert run([*words, str(tmp_path / source), str(tmp_path / out), *options]) == 0
        names = ("high_noise_model", "low_noise_model") if out == "original" else PARTS
        for part, name in zip(PARTS, names, strict=True):
            assert run(["verify", str(folder / part), str(tmp_path / out / name)]) == 0
    assert {place.name for place in (tmp_path / "original").iterdir()} >= {
        "high_noise_model",
        "low_noise_model",
        "Wan2.1_VAE.pth",
    }
    index = store.read_json(tmp_path / "diffusers" / "model_index.json")
    assert index["boundary_ratio"] == BOUNDARY
    assert index["transformer_2"] == index["transformer"]
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "original")]) == 0
    told = capsys.readouterr().out
    assert "experts: transformer from timestep 875 on, transformer_2 below it" in told
    assert "transformer_2: original layout" in told


def test_the_experts_are_not_swapped_and_are_loaded_apart(folder, tmp_path):
    pipe = idg.load_pipeline(folder)
    pipeline.save_pipeline(pipe, tmp_path / "saved")
    assert run(["verify", str(folder), str(tmp_path / "saved")]) == 0
    shutil.copytree(folder, tmp_path / "swapped")
    for old, new in (
        ("transformer", "x"),
        ("transformer_2", "transformer"),
        ("x", "transformer_2"),
    ):
        (tmp_path / "swapped" / old).rename(tmp_path / "swapped" / new)
    assert run(["verify", str(folder), str(tmp_path / "swapped")]) == 1
    for part, other in zip(PARTS, reversed(PARTS), strict=True):
        assert run(["verify", str(folder / part), str(tmp_path / "swapped" / other)]) == 0
    with pytest.raises(UserError, match="has two transformers, and one is needed here"):
        pipeline.load_transformer(folder)
    pipeline.load_transformer(folder / "transformer_2")


def test_an_expert_of_another_size_is_refused(folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "m")
    config = store.read_json(changed / "transformer_2" / "config.json")
    store.write_json(changed / "transformer_2" / "config.json", config | {"eps": 1e-5})
    with pytest.raises(UserError, match="two transformers must have equal sizes"):
        idg.load_pipeline(changed)


def test_an_adapter_is_needed_for_each_expert(tmp_path):
    (tmp_path / "a_high_noise").mkdir()
    with pytest.raises(
        UserError, match="one adapter whose name holds low_noise, and there is none"
    ):
        experts.expert_places(tmp_path, 2)
    (tmp_path / "b-LOW-noise.safetensors").touch()
    assert [path.name for path in experts.expert_places(tmp_path, 2)] == [
        "a_high_noise",
        "b-LOW-noise.safetensors",
    ]
    with pytest.raises(UserError, match="of two experts, and this model has one transformer"):
        experts.expert_places(tmp_path, 1)
    with pytest.raises(UserError, match="is one adapter, and this model has two transformers"):
        experts.expert_places(tmp_path / "b-LOW-noise.safetensors", 2)


@pytest.mark.parametrize(
    ("steps", "shift", "boundary"), [(25, 12.0, 0.875), (6, 3.0, 0.9), (4, 5.0, 0.01)]
)
def test_steps_go_to_the_expert_of_their_timestep(steps, shift, boundary):
    schedule = rollout.Schedule.make(steps, shift, boundary=boundary)
    of_high = np.asarray(schedule.timestep) >= 1000 * boundary
    assert schedule.counts == (of_high.sum(), steps - of_high.sum())
    assert of_high[schedule.steps_of(0)].all()
    assert not of_high[schedule.steps_of(1)].any()
    middle = schedule.part(1, steps - 1)
    assert sum(middle.counts) == steps - 2
    assert middle.counts[0] == of_high[1:-1].sum()


@pytest.mark.parametrize("window", ["random", "per_prompt"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_random_windows_give_each_expert_its_share(window, share):
    config = c.RolloutConfig(
        prompts=3, steps=25, window=window, window_size=2, window_low_noise=share
    )
    counts = rollout.Schedule.make(25, 12.0, boundary=0.875).counts
    assert counts == (16, 9)
    starts = np.stack([rollout.window_starts(config, 0, step, counts) for step in range(40)])
    low = starts >= counts[0]
    assert (low.all(1) | ~low.any(1)).all()  # one expert per training step
    assert low[:, 0].sum() == 40 * share
    assert (starts[~low] + 2 <= 16).all()
    assert (starts + 2 <= 24).all()  # the last step is never trained
    if 0 < share < 1:
        assert np.unique(starts[low]).size > 2
        assert np.unique(starts[~low]).size > 2
    one = dataclasses.replace(config, window_low_noise=0.5)
    np.testing.assert_array_equal(
        rollout.window_starts(one, 0, 7), rollout.window_starts(config, 0, 7, (25,))
    )


def test_fields_of_the_second_expert_need_one():
    for section, field, value in (
        ("rollout", "guidance_2", 3.0),
        ("evaluate", "guidance_2", 3.0),
        ("model", "experts_idle", "host"),
    ):
        part = dataclasses.replace(getattr(c.Config(), section), **{field: value})
        config = dataclasses.replace(c.Config(), **{section: part})
        config.require_experts(2)
        with pytest.raises(UserError, match=f"{section}.{field} is for a model with two"):
            config.require_experts(1)


def test_each_scale_falls_back_to_the_one_before_it():
    def scales(rollout=(4.0, 0.0), evaluation=(0.0, 0.0)):
        config = c.Config(
            rollout=c.RolloutConfig(guidance=rollout[0], guidance_2=rollout[1]),
            evaluate=c.EvaluateConfig(guidance=evaluation[0], guidance_2=evaluation[1]),
        )
        return config.guidance(), config.guidance(evaluation=True)

    assert scales() == ((4, 4), (4, 4))
    assert scales((4.0, 3.0)) == ((4, 3), (4, 3))
    assert scales((4.0, 3.0), (6.0, 0.0)) == ((4, 3), (6, 6))
    assert scales((4.0, 3.0), (0.0, 2.0)) == ((4, 3), (4, 2))
