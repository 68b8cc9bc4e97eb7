"""The autoencoder: reference arrays, chunks, causality, refusals; and the task that trains the small one."""

import dataclasses
import functools
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from checkpoints_convert import vae as table
from configs.embedded_vae import get_config
from jax_idgrpo import rng
from jax_idgrpo.models import vae
from jax_idgrpo.models.vae import RMSNorm, VAEConfig, WanVAE
from jax_idgrpo.planning.programs import PUBLISHED_VAE
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.synthetic.training import vae as task_vae
from jax_idgrpo.training.task import make_task

GOLDEN = Path(__file__).parent / "golden"
COMPILER = {"xla_backend_optimization_level": 0}  # compiling is what takes the time here
TINY = VAEConfig(4, (1, 2, 2, 3), 1, (False, True, True), (0.0,) * 16, (1.0,) * 16)


def error(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


@cache
def golden_vae():
    return nnx.split(pipeline.load_vae(GOLDEN / "tiny_vace"))


@cache
def program(graph, method, chunk=None):
    run = lambda state, x: getattr(nnx.merge(graph, state), method)(x, chunk)  # noqa: E731
    return jax.jit(run, compiler_options=COMPILER)


@cache
def tiny_vae():
    """Every weight random, the earlier taps in time too."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: WanVAE(TINY, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    fan_in = lambda shape: np.prod(shape[:-1]) if len(shape) > 1 else 4.0  # noqa: E731

    def random(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / fan_in(leaf.shape) ** 0.5, jnp.float32)

    return graph, jax.tree.map(random, shapes)


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
    assert memory(21) < memory(5) + 2 * video and memory(21) < memory(21, None) / 4
    latents = np.random.default_rng(3).normal(size=(1, 5, 8, 8, 16)).astype(np.float32)
    network = nnx.merge(graph, state)
    assert (
        network.chunk(5, 8, 8) == 1
        and error(network.decode(latents), network.decode(latents, None)) < 1e-5
    )


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
    assert network.chunk(21, 60, 104) == 1 and network.chunk(1, 8, 8) is None


def test_encoding_asks_for_full_precision():
    """Latents of photos are the same on every machine; on a CPU products are float32 anyway."""
    graph, state = tiny_vae()
    asked = jax.make_jaxpr(lambda video: nnx.merge(graph, state).encode(video))(
        np.zeros((1, 5, 16, 16, 3), np.float32)
    )
    products = [line for line in str(asked).splitlines() if "precision=" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_no_frame_sees_the_future():
    graph, state = tiny_vae()
    video = np.random.default_rng(2).uniform(-1, 1, (1, 21, 16, 24, 3)).astype(np.float32)
    changed = video.copy()
    changed[:, 9:] *= -1
    before, after = (program(graph, "encode")(state, x) for x in (video, changed))
    assert (
        np.array_equal(before[:, :3], after[:, :3])
        and error(after[:, 3], np.asarray(before[:, 3])) > 1e-2
    )


@pytest.mark.parametrize(
    "frames, size, reason", [(4, (16, 16), "1 . 4n frames"), (5, (16, 20), "multiples of 8")]
)
def test_sizes_that_do_not_fit_are_refused(frames, size, reason):
    graph, state = tiny_vae()
    with pytest.raises(ValueError, match=reason):
        nnx.merge(graph, state).encode(jnp.zeros((1, frames, *size, 3)))


@pytest.mark.parametrize(
    "change",
    [{"is_residual": True}, {"patch_size": 2}, {"dim_mult": [1, 2, 4]}, {"latents_std": [1.0]}],
)
def test_other_autoencoders_are_refused(change):
    with pytest.raises(ValueError):
        table.config_from_json(table.config_to_json(TINY) | change)


def test_config_survives_json():
    assert table.config_from_json(table.config_to_json(TINY)) == TINY


def test_norm_has_a_gradient_at_zero():
    norm = RMSNorm(4)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros((2, 4)))).all()


# ---- the task ------------------------------------------------------------------------------------------------------------


def small_task(**changes):
    config = get_config()
    options = config.finetune.options | dict(
        base_dim=2, dim_mult=[1, 2, 2, 2], clips_from=1, pictures=[2, 1], frames=5, crop=32
    )
    options |= dict(pictures_beside_clips=[1, 1]) | changes
    finetune = dataclasses.replace(config.finetune, batch=1, options=options)
    return make_task(dataclasses.replace(config, finetune=finetune))


def test_face_weights():
    boxes = jnp.array([[[[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]]])
    expected = [[1, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(task_vae.face_weights(boxes, (3, 4), 3.0)[0, 0], expected)


def test_windows_hold_a_face_of_every_row():
    view = task_vae.View("train", face_weight=3.0, crop=32)
    group = task_vae._draw_pictures(rng.key(3, "data"), 24, 8, view)
    assert (jnp.mean(group.weight == 3.0, axis=(1, 2, 3)) > 0.15).all()


@pytest.mark.slow
def test_batches_are_pictures_then_clips_too_and_repeat():
    task = small_task()
    (pictures,) = task.batch(5, 0)
    clips, more = task.batch(5, 1)
    assert pictures.video.shape == (3, 1, 32, 32, 3) and clips.video.shape == (1, 5, 32, 32, 3)
    assert more.video.shape == (2, 1, 32, 32, 3)
    np.testing.assert_array_equal(task.batch(5, 1)[0].video, clips.video)
    assert not np.array_equal(task.batch(5, 2)[0].video, clips.video)
    assert set(np.unique(clips.weight)) <= {1.0, 3.0}


@pytest.mark.slow
def test_a_new_network_is_blind_to_earlier_frames_and_learns():
    task = small_task()
    network = task.init(rng.key(0, "init"))
    (pictures,) = task.batch(5, 0)
    graph, state = nnx.split(network)

    @functools.partial(jax.jit, compiler_options=COMPILER)
    @jax.value_and_grad
    def loss(state):
        return task.loss(nnx.merge(graph, state), (pictures,), rng.key(0, "augment"))[0]

    value, gradients = loss(state)
    kernel = gradients["decoder"]["conv_in"]["kernel"][...]
    assert not kernel[:2].any() and kernel[2].any()
    assert not state["decoder"]["conv_in"]["kernel"][...][:2].any()
    stepped = jax.tree.map(
        lambda p, g: p - 1e-3 * g / optax.global_norm(gradients), state, gradients
    )
    assert loss(stepped)[0] < value


@pytest.mark.slow
def test_the_decoder_alone_leaves_the_encoder():
    task = small_task(train="decoder", pictures_beside_clips=[0, 0])
    graph, state = tiny_vae()
    (clips,) = task.batch(5, 1)
    value = lambda state: task.loss(nnx.merge(graph, state), (clips,), rng.key(0, "augment"))[0]  # noqa: E731
    gradients = jax.jit(jax.grad(value), compiler_options=COMPILER)(state)
    assert (
        optax.global_norm(gradients["encoder"]) == 0 and optax.global_norm(gradients["decoder"]) > 0
    )


@pytest.mark.slow
def test_saved_statistics_normalise_the_latents():
    graph, state = tiny_vae()
    network = task_vae.with_statistics(nnx.merge(graph, state), seed=1, frames=1)
    assert network.config.latents_mean != TINY.latents_mean
    groups = [
        task_vae._draw_pictures(rng.key(seed, "data"), 32, 32, task_vae.View("train"))
        for seed in range(2)
    ]
    latents = network.encode(jnp.concatenate([group.video for group in groups])).reshape(-1, 16)
    assert np.abs(latents.mean(axis=0)).max() < 0.2
    assert np.abs(latents.std(axis=0) - 1).max() < 0.2
