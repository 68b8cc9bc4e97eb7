"""Training the transformer's own weights: the update, and a run with its checkpoints and exports."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.sampler import make_models, make_sampler
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning import arguments, programs
from jax_idgrpo.sampling.adapters import saved_step
from jax_idgrpo.sampling.pipeline import load_pipeline
from jax_idgrpo.training import keeper, setup, train, update
from jax_idgrpo.training.state import start
from tests.helpers.tiny_run import full, rows
from tests.helpers.update import (
    ADVANTAGE,
    NEGATIVE,
    SCHEDULE,
    chunked,
    generated,
    gradients,
    objective,
    sampled,
    trained,
    vector,
)

PART = "blocks.1,vace_patch_embedding,ffn.net.2.bias"


# ---- the update ----------------------------------------------------------------------------------


def test_an_update_of_float32_weights_with_bfloat16_products():
    """On-policy to the bit, at distance 0 from the base before it, and steps below the resolution of bfloat16 are kept."""
    actor, params, base = trained(PART, "bfloat16")
    fixed = dataclasses.replace(objective(actor, kl=0.1), optimizer=optax.adam(1e-6))
    reference = actor.snapshot(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(reference)} == {
        jnp.dtype("float32"),
        jnp.dtype("bfloat16"),
    }
    networks = update.Networks(base=base, negative=NEGATIVE, reference=reference)
    batch = chunked([sampled((actor, params, base))], ADVANTAGE)

    def step(params):
        state = start(fixed.optimizer, params)
        return update.update(fixed, state, networks, batch, SCHEDULE, jnp.int32(0))

    moved, scalars = step(params)
    assert scalars["ratio_min"] == scalars["ratio_max"] == 1
    assert scalars["kl"] == 0
    for new, old in zip(*map(jax.tree.leaves, (moved.params, params)), strict=True):
        assert new.dtype == jnp.float32
        assert 0 < float(jnp.abs(new - old).max()) < 2e-6
    _, scalars = step(jax.tree.map(lambda leaf: leaf * 1.1, params))
    assert scalars["kl"] > 0


def test_selected_weights_have_the_gradients_that_they_have_among_all():
    """And the parts that are trained and frozen sample what the whole network samples."""
    parts = [trained(patterns) for patterns in ("", PART)]
    weights = parts[1][0].weights
    found = []
    for actor, params, base in parts:
        chunk = sampled((actor, params, base))
        chosen, others = weights.split(actor.weights.merge(params, base))
        moved = weights.merge(jax.tree.map(lambda leaf: leaf * 0.9, chosen), others)
        reference, _ = actor.weights.split(moved)
        gradient, logged = gradients(
            objective(actor, kl=0.1), params, base, chunked([chunk], ADVANTAGE), reference=reference
        )
        found.append((chunk.trajectory.latents, gradient, logged))
    (latents, gradient, logged), (some_latents, some, some_logged) = found
    np.testing.assert_array_equal(some_latents, latents)
    np.testing.assert_array_equal(some_logged["ratio"], np.ones_like(logged["ratio"]))
    assert float(logged["kl"].min()) > 0
    want = vector(weights.split(gradient)[0])
    assert 0 < len(want) < 0.7 * len(vector(gradient))
    assert np.linalg.norm(vector(some) - want) < 1e-5 * np.linalg.norm(want)


def test_weights_that_sampled_a_rollout_are_its_old_policy():
    """A copy in the network's dtypes is enough for a ratio of exactly 1, and it survives the update that donates the state."""
    actor, params, base = trained(PART, "bfloat16", guidance=1.0)
    fixed = objective(actor, objective="awm", kl=0.0, kl_units="velocity", clip=0.5, updates=2)
    batch = chunked([generated((actor, params, base))], ADVANTAGE)
    old = actor.snapshot(params)
    _, logged = gradients(fixed, params, base, batch, old=old)
    np.testing.assert_array_equal(logged["ratio"], np.ones_like(logged["ratio"]))
    copies = jax.tree.leaves(actor.snapshot(old))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(old)]
    assert not {leaf.unsafe_buffer_pointer() for leaf in copies} & set(pointers)


# ---- setting up ----------------------------------------------------------------------------------


MESH = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("kl", [0.004, 0.0])
def test_a_reference_is_held_only_where_it_is_compared_with(kl):
    """The devices hold what the plan counts: the weights, two moments, their average, and the reference."""
    config = full(1, grpo=dict(kl=kl))
    described = setup.build(config, MESH, abstract=True)
    gc.collect()
    known = {id(array) for array in jax.live_arrays()}
    run = setup.build(config, MESH)
    gc.collect()
    held = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
    assert held == arguments.resident(described)
    parts = programs.networks(config, None)
    held = programs.holdings(config, parts, MESH)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.params))
    assert held["frozen weights"] == 0
    for name in ("trained parameters", "gradient", "moving average"):
        assert held[name] == weights, name
    assert 2 * weights < held["optimizer moments"] < 2 * weights + 100
    assert held["reference"] == (weights if kl else 0)


def test_a_pattern_that_selects_nothing_is_one_line():
    with pytest.raises(UserError, match=r"model.train_layers 'blocks.99': selects no weight"):
        setup.build(full(1, "blocks.99"), MESH, abstract=True)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two steps on some weights, without a stop: configuration and workdir."""
    workdir, config = tmp_path_factory.mktemp("full"), full(2, "blocks.1,attn2,proj_out.weight")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=1))
    train.train(config, workdir)
    return config, workdir


def transformer_of(folder):
    """Return the tensors of a checkpoint's transformer."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_run_exports_a_complete_checkpoint_of_its_averaged_weights(straight):
    config, workdir = straight
    assert [(row["ratio_min"], row["ratio_max"]) for row in rows(workdir)] == [(1.0, 1.0)] * 2
    bundled, exported = (
        transformer_of(folder) for folder in (config.model.folder(), workdir / "export")
    )
    assert bundled.keys() == exported.keys()
    moved = {name for name, value in exported.items() if not np.array_equal(value, bundled[name])}
    assert moved == {
        name
        for name in bundled
        if name.startswith("blocks.1.") or ".attn2." in name or name.endswith("proj_out.weight")
    }
    pipe = load_pipeline(workdir / "export")
    assert saved_step(workdir / "export") == 2
    for part in ("vae", "text_encoder"):
        for file in (config.model.folder() / part).glob("*.safetensors"):
            ours, theirs = load_file(workdir / "export" / part / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert pipe.shift == load_pipeline(config.model.folder()).shift
    assert "train" in (workdir / "export" / "README.md").read_text()


def test_resume_of_weights_equals_never_having_stopped(straight, monkeypatch, tmp_path):
    """Also if the process was killed between a checkpoint and the first export."""
    config, undisturbed = straight

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "_export", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    assert not (tmp_path / "export").exists()
    train.train(config, tmp_path)
    one, two = (transformer_of(folder / "export") for folder in (undisturbed, tmp_path))
    for name, tensor in one.items():
        np.testing.assert_array_equal(two[name], tensor, err_msg=name)
    assert [row["policy_loss"] for row in rows(tmp_path)] == [
        row["policy_loss"] for row in rows(undisturbed)
    ]
    changed = dataclasses.replace(config.model, train_layers="blocks.1")
    with pytest.raises(UserError, match=r"model.train_layers was .* and is 'blocks.1'"):
        train.train(dataclasses.replace(config, model=changed), tmp_path)


def test_an_exported_checkpoint_is_compared_with_the_base(straight):
    """The network of the export, from the same noise, is the network that `model.path` gives."""
    config, workdir = straight
    sampler = make_sampler(config)
    models = make_models(sampler, {}, {"tuned": workdir / "export"})
    assert list(models) == ["base", "tuned"]
    alone = make_sampler(
        dataclasses.replace(
            config, model=dataclasses.replace(config.model, path=str(workdir / "export"))
        )
    )
    whole = make_models(alone, {})["base"]
    for name, leaf in zip(
        range(10**6), zip(*map(jax.tree.leaves, (models["tuned"].base, whole.base)), strict=True)
    ):
        np.testing.assert_array_equal(*leaf, err_msg=str(name))
