"""Phantom as a policy: three branches with the photos behind the video, only the video is the state, and the same loop as VACE."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from checkpoints_convert import rules
from checkpoints_convert import wan as table
from jax_idgrpo import config as c
from jax_idgrpo import rng
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanConfig, WanTransformer, wan_1_3b, wan_14b
from jax_idgrpo.sampling import adapters, conditioning, policy
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.training import setup
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN
from tests.helpers.phantom import (
    FRAMES,
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


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_guided_velocity_equals_the_original(case):
    folder = GOLDEN / "wan_original_tiny"
    sizes = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = WanConfig(
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["dim"] // sizes["num_heads"],
        ffn_dim=sizes["ffn_dim"],
        text_dim=tensors["text_embedding.0.weight"].shape[1],
        freq_dim=sizes["freq_dim"],
        rank=1,
        alpha=1.0,
    )
    bare = dataclasses.replace(config, rank=0)
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: WanTransformer(bare, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
        )
    )
    plain = nnx.merge(graph, rules.to_jax(table.rules(bare, "original"), tensors, abstract))
    arrays = {
        name.removeprefix(f"{case}_"): value
        for name, value in np.load(GOLDEN / "phantom_guidance.npz").items()
        if case in name
    }
    scales = float(arrays["scale_text"]), float(arrays["scale_image"])
    actor, _, base = policy.split(adapters.add_adapter(plain, 1, 1.0, rng.key(0, "init")), *scales)
    latents, references = arrays["latents"], arrays["references"]
    count = len(latents)
    velocity = jax.jit(
        lambda row, given, negative: actor.velocity(
            policy.PolicyInputs(None, base, given[1], negative), row, given[0]
        )
    )
    for row in range(count):
        one = slice(row, row + 1)
        given = Conditioning(
            text=jnp.asarray(arrays["text"][one]),
            control=None,
            frame_mask=jnp.ones((1, latents.shape[1]), bool),
            references=jnp.asarray([references.shape[1]]),
            reference_latents=jnp.asarray(references[one]),
        )
        got = velocity(
            latents[one],
            (jnp.int32(arrays["timesteps"][row]), given),
            jnp.asarray(arrays["negative_text"][row]),
        )
        assert relative_error(got, arrays["velocity"][one]) < 1e-4
    photos = given.reference_latents
    wrong = dataclasses.replace(
        given, reference_latents=photos[:, ::-1] if references.shape[1] > 1 else 0 * photos
    )
    got = velocity(
        latents[one],
        (jnp.int32(arrays["timesteps"][-1]), wrong),
        jnp.asarray(arrays["negative_text"][-1]),
    )
    assert relative_error(got, arrays["velocity"][one]) > 1e-3


@pytest.mark.parametrize("scales", [(7.5, 5.0), (1.0, 1.0)])
def test_first_update_after_a_rollout_has_a_ratio_of_exactly_one(scales):
    actor, lora, base = model(*scales)
    assert actor.branches == (3 if scales[0] > 1 else 1)
    assert actor.unguided().branches == 1
    chunk = sampled((actor, lora, base))
    # The state is the video: no photo is denoised.
    assert chunk.trajectory.x.shape == (ROWS, STEPS, FRAMES, 4, 6, 16)
    gradient, rows = gradients(objective(actor), lora, base, chunked([chunk]))
    np.testing.assert_array_equal(rows["ratio"], np.ones((1, STEPS - 1, ROWS)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(optax.global_norm(gradient)) > 0
    assert float(rows["kl"].min()) > 0


def test_a_row_does_not_depend_on_its_neighbours_or_on_its_padding():
    parts = model()
    together = sampled(parts).trajectory
    given = jax.tree.map(lambda leaf: leaf[:1], asked())
    bare = dataclasses.replace(given, reference_latents=given.reference_latents[:, :1])
    for alone in (
        sampled(parts, slice(0, 1), given).trajectory,
        sampled(parts, slice(0, 1), bare).trajectory,
    ):
        np.testing.assert_allclose(together.log_prob[:1], alone.log_prob, rtol=1e-5)
        np.testing.assert_allclose(together.x[:1], alone.x, atol=1e-4)
    other = dataclasses.replace(given, reference_latents=2 * given.reference_latents)
    assert np.abs(sampled(parts, slice(0, 1), other).trajectory.x - together.x[:1]).max() > 1e-2


def test_micro_batches_equal_one_batch():
    actor, lora, base = model()
    one, _ = gradients(objective(actor), lora, base, chunked([sampled((actor, lora, base))]))
    parts, _ = gradients(
        objective(actor),
        lora,
        base,
        chunked([sampled((actor, lora, base), rows) for rows in (slice(0, 2), slice(2, 4))]),
    )
    away = optax.global_norm(jax.tree.map(jnp.subtract, one, parts))
    assert float(away) < 1e-5 * float(optax.global_norm(one))


def test_published_sizes():
    for config, count, total in (
        (wan_1_3b(), 825, 1_418_996_800),
        (wan_14b(), 1095, 14_288_491_584),
    ):
        shapes = nnx.state(
            nnx.eval_shape(
                lambda: WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
            )
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total
        assert len(rules.expand(table.rules(config), shapes)) == count


def test_photos_are_fitted_once_and_centred_on_white():
    wide, tall = (
        Image.new("RGB", (90, 30), (10, 20, 30)),
        Image.new("RGBA", (20, 60), (200, 0, 0, 255)),
    )
    got = conditioning.whole_canvas(wide, 32, 48)
    assert got.shape == (32, 48, 3)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[:8], 1)
    np.testing.assert_array_equal(got[24:], 1)
    np.testing.assert_allclose(
        got[8:24], np.broadcast_to(np.asarray([10, 20, 30]) / 127.5 - 1, (16, 48, 3)), atol=1e-6
    )
    columns = np.flatnonzero((conditioning.whole_canvas(tall, 32, 48)[16] < 0.99).any(-1))
    assert (columns[0], len(columns)) == ((48 - 10) // 2, 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory)


def test_photos_stand_behind_the_video_in_their_order(checkpoint, tmp_path):
    config = short(checkpoint)
    pipe = setup.load(config)
    paths = []
    for n in range(3):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(
            np.random.default_rng(n).integers(0, 256, (40, 30 + 9 * n, 3), dtype=np.uint8)
        ).save(paths[-1])
    prompts = [Prompt(0, "a person", (paths[2],)), Prompt(1, "two people", (paths[0], paths[1]))]
    given = conditioning.encode(pipe, prompts, config, conditioning.Cache())
    assert given.control is None
    assert given.latent_shape == (2, 8, 8, 16)
    assert given.frame_mask.all()
    assert given.reference_mask.tolist() == [[True, False, False], [True, True, False]]
    photo = conditioning.whole_canvas(Image.open(paths[1]), 64, 64)
    np.testing.assert_allclose(
        given.reference_latents[1, 1],
        pipe.vae.encode(jnp.asarray(photo)[None, None])[0, 0],
        atol=1e-4,
    )
    assert not np.any(given.reference_latents[1, 2])
    assert given.video_frames(3) == 2
    placed = jax.device_put(given)
    with jax.transfer_guard("disallow"):  # as inside a step
        start = placed.video_start
    assert start.tolist() == [0, 0]


def test_what_a_kind_does_not_have_is_refused(checkpoint):
    with pytest.raises(
        UserError,
        match=r"rollout.image_guidance 5.0 scales a branch that model.kind vace does not have "
        r"\(only phantom, refalign, skyreels\)",
    ):
        c.Config(rollout=c.RolloutConfig(image_guidance=5.0))
    with pytest.raises(
        UserError, match=r"data.max_people is 5; model.kind phantom takes up to 4 photos"
    ):
        c.Config(model=c.ModelConfig(kind="phantom"), data=c.DataConfig(max_people=5))
    with pytest.raises(UserError, match="'phantom' was given, .* 'vace'"):
        setup.load(c.Config(model=c.ModelConfig(kind="phantom", unroll=True)))
    with pytest.raises(
        UserError,
        match=r"plain Wan \(T2V\), which takes no reference photos; .* --model.kind phantom",
    ):
        setup.load(c.Config(model=c.ModelConfig(path=str(checkpoint))))
