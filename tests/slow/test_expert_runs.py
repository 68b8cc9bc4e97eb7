"""Two experts: updates of each, a training run that is stopped and resumed, and its plan."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from checkpoints_convert.__main__ import run as convert
from checkpoints_convert.experts import expert_places
from jax_idgrpo import config as c
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.commands import evaluate, sample
from jax_idgrpo.models.experts import NAMES, Pair, each
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning import programs
from jax_idgrpo.planning.arguments import chip_bytes
from jax_idgrpo.training import setup, update
from jax_idgrpo.training.state import start
from jax_idgrpo.training.train import train
from tests.helpers.experts import OPTIMIZER, SCHEDULE, STEPS, batch, model, objective, two_experts
from tests.helpers.prompts import write_bundled_prompts
from tests.helpers.tiny_run import rows, tiny
from tests.helpers.update import NEGATIVE


def stepped(first, size, trained):
    """The states of both experts before and after an update, and what it logs."""
    actor, lora, base = model()
    rule = objective(actor)
    kept = [part if expert in trained else None for expert, part in enumerate(each(base))]
    networks = update.Networks(base=Pair(*kept), negative=NEGATIVE)
    before = start(OPTIMIZER, lora)
    after, scalars = update.update(
        rule,
        start(OPTIMIZER, lora),
        networks,
        batch(first, size),
        SCHEDULE,
        jnp.int32(0),
        trained=trained,
    )
    return before, after, scalars


def moved(before, after, expert):
    """Whether any leaf of an expert's adapter, average or moments changed."""
    pairs = zip(
        *(
            jax.tree.leaves([each(part)[expert] for part in (s.params, s.ema, s.optimizer)])
            for s in (before, after)
        ),
        strict=True,
    )
    return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("first", "size", "trained"), [(0, 2, (0,)), (2, 1, (1,)), (0, STEPS - 1, (0, 1))]
)
def test_the_ratio_is_one_and_only_the_experts_that_ran_move(first, size, trained):
    assert SCHEDULE.counts == (2, 2)
    before, after, scalars = stepped(first, size, trained)
    assert scalars["ratio_min"] == scalars["ratio_max"] == 1
    assert scalars["skipped"] == 0
    for expert, name in enumerate(NAMES):
        assert moved(before, after, expert) == (expert in trained)
        assert (f"gradient_norm_{name}" in scalars) == (expert in trained)


def test_each_expert_gets_the_gradient_of_its_own_steps():
    """With a window over both, an expert's gradient is that of its steps alone, by their share."""
    actor, lora, base = model()
    rule = objective(actor)
    both, one = batch(), batch(0, 2)
    for name in ("x", "velocity", "log_prob"):  # the same start and noise
        a, b = (getattr(each.trajectory, name) for each in (both, one))
        np.testing.assert_allclose(a[:, :, : b.shape[2]], b, rtol=1e-5, atol=1e-5)
    networks = update.Networks(base=base, negative=NEGATIVE)
    differentiate = jax.jit(update.gradients, static_argnums=0, static_argnames="trained")
    given = (SCHEDULE, jnp.int32(0))
    pair, _ = differentiate(rule, lora, networks, both, *given, trained=(0, 1))
    alone, _ = differentiate(rule, lora, networks, one, *given, trained=(0,))
    for got, want in zip(jax.tree.leaves(pair.high_noise), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, want * 2 / 3, rtol=1e-3, atol=1e-5)
    assert optax.global_norm(pair.low_noise) > 0


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = two_experts(tmp_path_factory.mktemp("experts") / "pipeline")
    made = tiny(2, window="random", shift=3.0, guidance=2.0, guidance_2=1.0)
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, path=str(folder)),
        rollout=dataclasses.replace(made.rollout, steps=STEPS),
        run=dataclasses.replace(made.run, sample_every=0),
    )


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train(config, workdir)
    return workdir


def exported(workdir):
    return [load_file(workdir / "export" / name / "adapter_model.safetensors") for name in NAMES]


def test_a_stopped_run_goes_on_bit_for_bit_with_experts_on_the_host(config, straight, tmp_path):
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=1)), tmp_path)
    high, low = exported(tmp_path)
    assert any(value.any() for name, value in high.items() if "lora_B" in name)
    assert not any(value.any() for name, value in low.items() if "lora_B" in name)
    train(with_model(config, experts_idle="host"), tmp_path)
    for one, other in zip(exported(straight), exported(tmp_path), strict=True):
        assert one.keys() == other.keys()
        assert any(value.any() for name, value in one.items() if "lora_B" in name)
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    for row, name in zip(rows(tmp_path), NAMES, strict=True):
        assert row["ratio_min"] == row["ratio_max"] == 1
        assert row[f"gradient_norm_{name}"] == pytest.approx(row["gradient_norm"])
        assert row["forward_passes_rollout"] == 4 * (2 * 2 + 2 * 1)


def test_the_adapters_of_a_run_are_sampled_with(config, straight, tmp_path):
    write_bundled_prompts(tmp_path / "prompts.csv", "eval", 1)
    few = dataclasses.replace(
        config, evaluate=c.EvaluateConfig(videos=1, steps=STEPS, batch=1, guidance_2=2.0)
    )
    for name, lora in (("base", None), ("tuned", straight)):
        sample(few, tmp_path / "prompts.csv", tmp_path / name, lora)
    files = [(tmp_path / name / "0000-0.mp4").read_bytes() for name in ("base", "tuned")]
    assert files[0] != files[1]
    with pytest.raises(UserError, match="is one adapter, and this model has two transformers"):
        sample(few, tmp_path / "prompts.csv", tmp_path / "x", straight / "export" / NAMES[0])
    for form in ("diffusers-lora", "comfyui", "kohya"):
        out = tmp_path / form
        assert convert(["export", str(straight), str(out), "--format", form]) == 0
        assert {place.name for place in out.iterdir()} == set(NAMES)
        for name in NAMES:
            assert convert(["verify", str(straight / "export" / name), str(out / name)]) == 0
    pair = tuple(tmp_path / "comfyui" / name for name in NAMES)
    assert expert_places(tmp_path / "comfyui", 2) == pair
    merged = ["export", str(straight), str(tmp_path / "m"), "--format", "merged"]
    with pytest.raises(UserError, match="export each onto its own, with --base MODEL/transformer"):
        convert(merged)
    with pytest.raises(UserError, match="of two transformers, high_noise and low_noise; give one"):
        convert(["inspect", str(straight / "export")])
    one = dataclasses.replace(
        with_model(few, path="embedded"),
        rollout=dataclasses.replace(few.rollout, guidance_2=0.0),
        evaluate=c.EvaluateConfig(videos=1, batch=1),
    )
    with pytest.raises(UserError, match="of two experts, and this model has one transformer"):
        sample(one, tmp_path / "prompts.csv", tmp_path / "y", straight)


def test_a_pair_is_evaluated_against_its_base(config, straight, tmp_path):
    write_bundled_prompts(tmp_path / "prompts.csv", "eval", 2)
    sampling = c.EvaluateConfig(videos=1, steps=STEPS, batch=2, guidance_2=2.0)
    few = dataclasses.replace(config, evaluate=sampling)
    pair = straight / "export"
    evaluate(few, tmp_path / "prompts.csv", tmp_path / "out", {"run": straight, "pair": pair})
    scores: dict[str, list] = {"base": [], "run": [], "pair": []}
    for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores[row["model"]].append(row["values"]["reward"])
    assert len(scores["base"]) == 2
    assert scores["run"] == scores["pair"] != scores["base"]


def test_what_cannot_train_two_experts_is_refused(config):
    def refused(counts=(2, 2), model=None, grpo=None, **sampling):
        changed = with_model(config, **(model or {}))
        changed = dataclasses.replace(
            changed,
            rollout=dataclasses.replace(config.rollout, **sampling),
            grpo=GrpoConfig(**(grpo or {})),
        )
        with pytest.raises(UserError) as error:
            setup.check_experts(changed, counts)
        return str(error.value)

    assert "window_size 2 is more than the 1 trainable steps of the low_noise" in refused(
        window_size=2
    )
    nft = dict(objective="nft", kl_units="velocity")
    assert "objectives that replay steps; use clip" in refused(grpo=nft, window="none")
    host = dict(experts_idle="host")
    assert "rollout.window all trains both in one update" in refused(model=host, window="all")
    assert "rollout.guidance_2 is for a model with two" in refused(counts=(4,))


# ---- plan ----------------------------------------------------------------------------------------


def test_the_plan_counts_both_experts_and_host_memory_frees_one(config):
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])

    def planned(**changes):
        changed = with_model(config, **changes)
        parts = programs.networks(changed, None)
        listed = list(programs.programs(changed, parts, mesh))
        run = setup.build(changed, mesh, abstract=True, architecture=parts)
        return {one.name: one for one in listed}, programs.resident(run), run

    device, held, run = planned()
    host, freed, _ = planned(experts_idle="host")
    assert held - freed == chip_bytes(run.base)
    for name in NAMES:
        spoken = name.replace("_", " ")
        assert device[f"rollout: {spoken}"].calls == 1
        assert device[f"update: {spoken}"].calls == 0.5
        assert f"evaluation: sample: {spoken}" in device
        one = f"rollout: {spoken}"
        assert chip_bytes(host[one].arguments[1:]) == chip_bytes(device[one].arguments[1:])
        assert host[one].beside < device[one].beside
        lowered = host[one].function.lower(*host[one].arguments, **host[one].options)
        assert lowered.out_info.latents.shape == (4, 5, 8, 8, 16)
