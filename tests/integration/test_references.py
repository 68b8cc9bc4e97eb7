"""RefAlign and SkyReels-V3 as policies: photos without text, attended zero latents, and how a checkpoint says what it is."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from checkpoints_convert import checkpoint as checkpoints
from checkpoints_convert import store
from jax_idgrpo import config as c
from jax_idgrpo import rng
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.training import setup
from tests.helpers.convert import run
from tests.helpers.layouts import original
from tests.helpers.paths import CONFIGS
from tests.helpers.phantom import (
    ROWS,
    STEPS,
    asked,
    chunked,
    gradients,
    make_checkpoint,
    model,
    objective,
    sampled,
    short,
)

SCALES = {"refalign": (7.5, 5.0), "skyreels": (1.0, 1.0)}


def given(kind):
    """Return the conditioning of four rows, with zeros in the padding, as `encode` makes it."""
    made = asked(kind)
    photos = made.reference_mask[..., None, None, None]
    return dataclasses.replace(made, reference_latents=made.reference_latents * photos)


@pytest.mark.parametrize("kind", SCALES)
def test_the_ratio_is_exactly_one_and_a_row_does_not_depend_on_its_neighbours(kind):
    actor, lora, base = model(*SCALES[kind])
    chunk = sampled((actor, lora, base), given=given(kind))
    gradient, rows = gradients(objective(actor), lora, base, chunked([chunk]))
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, STEPS - 1, ROWS)))
    assert np.isfinite(float(optax.global_norm(gradient)))
    assert float(optax.global_norm(gradient)) > 0
    first = slice(0, 1)
    alone = jax.tree.map(lambda leaf: leaf[first], given(kind))
    one = sampled((actor, lora, base), first, alone).trajectory
    np.testing.assert_allclose(chunk.trajectory.log_prob[:1], one.log_prob, rtol=1e-5)
    np.testing.assert_allclose(chunk.trajectory.x[:1], one.x, atol=1e-4)
    # Row 0 has one photo: its second slot is masked for RefAlign and an input of SkyReels-V3.
    other = dataclasses.replace(alone, reference_latents=alone.reference_latents.at[:, 1].set(1.0))
    changed = np.abs(sampled((actor, lora, base), first, other).trajectory.x - one.x).max()
    assert (changed > 1e-3) == (kind == "skyreels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def skyreels(folder, tmp_path_factory):
    """The folder as SkyReels-V3 publishes it: its own class in the transformer's config.json."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("skyreels") / "pipeline")
    values = store.read_json(copy / "transformer" / "config.json")
    values["_class_name"] = "SkyReelsA2WanI2v3DModel"
    store.write_json(copy / "transformer" / "config.json", values)
    return copy


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of different sizes, and a CSV with five of them and with none."""
    place = tmp_path_factory.mktemp("photos")
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 30 + 9 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{n}.png")
    names = ";".join(f"{n}.png" for n in range(5))
    (place / "many.csv").write_text(f"ref_paths,prompt\n{names},five people\n")
    (place / "none.csv").write_text("ref_paths,prompt\n,nobody\n")
    return place


def test_every_row_of_skyreels_has_four_slots_and_photos_drawn_from_the_posterior(skyreels, photos):
    config = short(skyreels, kind="skyreels")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_people=2))
    pipe = setup.load(config)
    assert pipe.kind == "skyreels"
    paths = [photos / f"{n}.png" for n in range(2)]
    prompts = [Prompt(0, "a person", (paths[1],)), Prompt(1, "two people", tuple(paths))]

    def encode(chosen, config=config):
        return conditioning.encode(pipe, chosen, config, conditioning.Cache())

    both = encode(prompts)
    assert config.reference_frames == 4
    assert both.reference_latents.shape == (2, 4, 8, 8, 16)
    assert (both.padding_attended, both.photos_read_text) == (True, True)
    assert not np.any(both.reference_latents[0, 1:])
    assert not np.any(both.reference_latents[1, 2:])
    # The noise depends on the seed, the prompt and the photo, and on nothing else.
    np.testing.assert_array_equal(
        encode(prompts[1:]).reference_latents[0], both.reference_latents[1]
    )
    assert np.any(both.reference_latents[0, 0] != both.reference_latents[1, 1])
    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=7))
    assert np.any(encode(prompts, seeded).reference_latents[0, 0] != both.reference_latents[0, 0])
    refalign = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="refalign"))
    masked = encode(prompts, refalign)
    assert masked.reference_latents.shape == (2, 2, 8, 8, 16)
    assert (masked.padding_attended, masked.photos_read_text) == (False, False)
    # RefAlign takes the mean; a sample differs from it by noise times a positive deviation.
    away = both.reference_latents[0, 0] - masked.reference_latents[0, 0]
    noise = jax.random.normal(rng.fold(rng.key(config.run.seed, "photo"), 0, 0), (1, 1, 8, 8, 16))
    visible = np.abs(away) > 1e-4
    assert visible.mean() > 0.5
    np.testing.assert_array_equal(np.sign(away)[visible], np.sign(noise)[0, 0][visible])


def test_a_checkpoint_says_what_it_is(skyreels, folder, tmp_path, capsys):
    """By the class in its config.json, or by what was stated at import."""
    assert checkpoints.open_checkpoint(skyreels).kind == "skyreels"
    for kind in ("vace", "phantom"):
        with pytest.raises(
            UserError, match=f"kind skyreels, and kind {kind} was given; pass --model.kind skyreels"
        ):
            checkpoints.open_checkpoint(skyreels, kind)
    assert run("import", skyreels, tmp_path / "stored") == 0
    assert checkpoints.open_checkpoint(tmp_path / "stored").kind == "skyreels"
    assert run("export", tmp_path / "stored", tmp_path / "out", "--format", "diffusers") == 0
    assert run("verify", tmp_path / "out", skyreels) == 0
    assert checkpoints.open_checkpoint(tmp_path / "out").kind == "skyreels"
    assert 'license: "other"' in (tmp_path / "out" / "README.md").read_text()

    base = original(tmp_path, "wan", "float32")
    file = tmp_path / "refalign" / "model.safetensors"
    file.parent.mkdir()
    shutil.copy(base / "config.json", file.parent)
    tensors = {
        name: np.array(tensor)
        for name, tensor in store.open_file(base / "diffusion_pytorch_model.safetensors")[0].items()
    }
    extra = {"blocks.0.input_mlp.proj.0.weight": np.ones((3, 2), np.float32)}
    store.write_file(file, tensors | extra)
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.input_mlp"):
        run("import", file, tmp_path / "no", "--with", base)
    capsys.readouterr()
    assert run("import", file, tmp_path / "store", "--as", "refalign", "--with", base) == 0
    assert "left out 1 tensors that it does not have: blocks.0.input_mlp" in capsys.readouterr().out
    found = checkpoints.open_checkpoint(tmp_path / "store", "refalign")
    assert found.kind == "refalign"
    scheduler = json.loads((tmp_path / "store/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 5.0
    for kind in ("vace", "phantom"):
        with pytest.raises(UserError, match="pass --model.kind refalign") as caught:
            checkpoints.open_checkpoint(tmp_path / "store", kind)
        assert "\n" not in str(caught.value)
    store.write_file(file, tensors | {"blocks.0.other.weight": np.ones((3, 2), np.float32)})
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.other"):
        run("import", file, tmp_path / "no", "--as", "refalign", "--with", base)


@pytest.mark.parametrize("kind", SCALES)
def test_a_number_of_photos_that_the_model_does_not_take_is_refused(kind, photos):
    config = c.Config(model=c.ModelConfig(kind=kind))
    people = config.data.max_people
    for name, what in (
        ("many", f"5 reference photos, but data.max_people is {people}"),
        ("none", "no reference photo"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            load_prompts(photos / f"{name}.csv", people)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=f"data.max_people is 5; model.kind {kind} takes up to 4 photos"
    ):
        c.Config(model=c.ModelConfig(kind=kind), data=c.DataConfig(max_people=5))


def test_recipes_have_the_published_settings():
    skyreels = c.load(CONFIGS / "skyreels_v3_14b.py")
    rollout, evaluate = skyreels.rollout, skyreels.evaluate
    assert (rollout.steps, rollout.guidance, rollout.shift) == (8, 1.0, 5.0)
    assert (rollout.sampler, rollout.noise_level) == ("flow", 0.2)
    assert (evaluate.steps, evaluate.solver, skyreels.video.fps) == (8, "unipc", 24)
    assert skyreels.image_guidance() == skyreels.image_guidance(evaluation=True) == 1.0
    refalign = c.load(CONFIGS / "refalign_1_3b.py")
    assert (refalign.rollout.guidance, refalign.image_guidance()) == (7.5, 5.0)
    assert (refalign.rollout.shift, refalign.video.fps) == (5.0, 16)
