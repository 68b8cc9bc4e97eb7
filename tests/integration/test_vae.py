"""The autoencoder: reference arrays, chunks, causality, refusals; and the task that trains the small one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import vae as table
from jax_idgrpo import rng
from jax_idgrpo.models import vae
from jax_idgrpo.models.vae import RMSNorm, WanVAE
from jax_idgrpo.planning.programs import PUBLISHED_VAE
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.synthetic.training import vae as task_vae
from tests.helpers.paths import GOLDEN
from tests.helpers.vae import COMPILER, TINY, tiny_vae


def error(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


@cache
def golden_vae():
    return nnx.split(pipeline.load_vae(GOLDEN / "tiny_vace"))


@cache
def program(graph, method, chunk=None):
    run = lambda state, x: getattr(nnx.merge(graph, state), method)(x, chunk)  # noqa: E731
    return jax.jit(run, compiler_options=COMPILER)


@pytest.mark.parametrize("frames", [1, 9])
def test_encode_agrees_with_the_reference_arrays(frames):
    graph, state = golden_vae()
    arrays = np.load(GOLDEN / "vae_tiny_encode.npz")
    latents = program(graph, "encode")(state, arrays[f"video_f{frames}"])
    assert error(latents, arrays[f"latents_f{frames}"]) < 1e-5


@pytest.mark.parametrize("latents", [1, 3])
def test_decode_agrees_with_the_reference_arrays(latents):
    graph, state = golden_vae()
    arrays = np.load(GOLDEN / "vae_tiny_decode.npz")
    video = program(graph, "decode")(state, arrays[f"latents_t{latents}"])
    assert error(video, arrays[f"video_t{latents}"]) < 1e-5


def test_chunks_give_the_whole_video():
    """Six latent frames in chunks of two: the first two, then twice two that remember the ones before."""
    graph, state = tiny_vae()
    video = np.random.default_rng(1).uniform(-1, 1, (1, 21, 16, 24, 3)).astype(np.float32)
    whole = program(graph, "encode")(state, video)
    assert error(program(graph, "encode", 2)(state, video), whole) < 1e-5
    assert (
        error(program(graph, "decode", 2)(state, whole), program(graph, "decode")(state, whole))
        < 1e-5
    )


def test_a_gradient_through_a_long_decode_takes_little_more_memory_than_the_decode():
    """Twenty chunks: the activations of all of them would be many times those of one."""
    graph, state = tiny_vae()
    latents = jax.ShapeDtypeStruct((1, 21, 8, 8, 16), jnp.float32)

    def decode(latents):
        return nnx.merge(graph, state).decode(latents, 1)

    def memory(function):
        return (
            jax.jit(function).lower(latents).compile(COMPILER).memory_analysis().temp_size_in_bytes
        )

    assert memory(jax.grad(lambda latents: jnp.sum(decode(latents) ** 2))) < 10 * memory(decode)


def test_a_decode_without_options_takes_the_memory_of_a_few_frames(monkeypatch):
    """Whatever the length of the video, once it is large; the same video comes out as at once."""
    monkeypatch.setattr(vae, "LARGEST_ACTIVATION", 2**17)
    graph, state = tiny_vae()

    def memory(frames, *chunk):
        latents = jax.ShapeDtypeStruct((1, frames, 8, 8, 16), jnp.float32)
        program = jax.jit(lambda latents: nnx.merge(graph, state).decode(latents, *chunk))
        return program.lower(latents).compile(COMPILER).memory_analysis().temp_size_in_bytes

    video = np.prod((84, 64, 64, 3)) * 4  # it is clamped as a whole
    assert memory(21) < memory(5) + 2 * video
    assert memory(21) < memory(21, None) / 4
    latents = np.random.default_rng(3).normal(size=(1, 5, 8, 8, 16)).astype(np.float32)
    network = nnx.merge(graph, state)
    assert network.chunk(5, 8, 8) == 1
    assert error(network.decode(latents), network.decode(latents, None)) < 1e-5


def test_an_encode_without_options_takes_the_memory_of_a_few_frames(monkeypatch):
    monkeypatch.setattr(vae, "LARGEST_ACTIVATION", 2**17)
    graph, state = tiny_vae()

    def memory(frames, *chunk):
        video = jax.ShapeDtypeStruct((1, frames, 64, 64, 3), jnp.float32)
        program = jax.jit(lambda video: nnx.merge(graph, state).encode(video, *chunk))
        return program.lower(video).compile(COMPILER).memory_analysis().temp_size_in_bytes

    assert memory(81) < memory(81, None) / 3
    video = np.random.default_rng(4).uniform(-1, 1, (1, 17, 64, 64, 3)).astype(np.float32)
    network = nnx.merge(graph, state)
    assert error(network.encode(video), network.encode(video, None)) < 1e-5


def test_the_published_autoencoder_decodes_a_large_video_one_latent_frame_at_a_time():
    network = nnx.eval_shape(lambda: WanVAE(PUBLISHED_VAE, rngs=nnx.Rngs(0)))
    assert network.chunk(21, 60, 104) == 1
    assert network.chunk(1, 8, 8) is None


def test_encoding_asks_for_full_precision():
    """Latents of photos are the same on every machine; on a CPU products are float32 anyway."""
    graph, state = tiny_vae()
    asked = jax.make_jaxpr(lambda video: nnx.merge(graph, state).encode(video))(
        np.zeros((1, 5, 16, 16, 3), np.float32)
    )
    products = [line for line in str(asked).splitlines() if "precision=" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_no_frame_sees_the_future():
    graph, state = tiny_vae()
    video = np.random.default_rng(2).uniform(-1, 1, (1, 21, 16, 24, 3)).astype(np.float32)
    changed = video.copy()
    changed[:, 9:] *= -1
    before, after = (program(graph, "encode")(state, x) for x in (video, changed))
    assert np.array_equal(before[:, :3], after[:, :3])
    assert error(after[:, 3], np.asarray(before[:, 3])) > 1e-2


@pytest.mark.parametrize(
    ("frames", "size", "reason"), [(4, (16, 16), "1 . 4n frames"), (5, (16, 20), "multiples of 8")]
)
def test_sizes_that_do_not_fit_are_refused(frames, size, reason):
    graph, state = tiny_vae()
    with pytest.raises(ValueError, match=reason):
        nnx.merge(graph, state).encode(jnp.zeros((1, frames, *size, 3)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_residual": True}, "is_residual is .*, Wan 2.1 has"),
        ({"patch_size": 2}, "patch_size is .*, Wan 2.1 has"),
        ({"dim_mult": [1, 2, 4]}, "the 3 levels of dim_mult have 2 steps"),
        ({"latents_std": [1.0]}, "latents_std need z_dim = 16 entries"),
    ],
)
def test_other_autoencoders_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        table.config_from_json(table.config_to_json(TINY) | change)


def test_config_survives_json():
    assert table.config_from_json(table.config_to_json(TINY)) == TINY


def test_norm_has_a_gradient_at_zero():
    norm = RMSNorm(4)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros((2, 4)))).all()


def test_face_weights():
    boxes = jnp.array([[[[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]]])
    expected = [[1, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(task_vae.face_weights(boxes, (3, 4), 3.0)[0, 0], expected)


def test_windows_hold_a_face_of_every_row():
    view = task_vae.View("train", (64, 64), face_weight=3.0, crop=32)
    group = task_vae._draw_pictures(rng.key(3, "data"), 24, 8, view)
    assert (jnp.mean(group.weight == 3.0, axis=(1, 2, 3)) > 0.15).all()
