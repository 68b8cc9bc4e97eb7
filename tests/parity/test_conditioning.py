"""Canvas and control against diffusers' WanVACEPipeline, with a tiny VAE of random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanVACEPipeline
from flax import nnx
from PIL import Image

from jax_idgrpo.config import Config, DataConfig, VideoConfig
from jax_idgrpo.data import controls
from jax_idgrpo.data.places import Places, draw_places
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import from_uint8, write_video
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.pipeline import load_vae
from tests.helpers import torch_models

HEIGHT, WIDTH, FRAMES = 96, 160, 9  # diffusers builds no mask for more photos than latent frames
SIZES = [(211, 300), (37, 50), (500, 100), (WIDTH, HEIGHT)]


class NoText(nnx.Module):
    """A text encoder that says nothing."""

    def __call__(self, ids, mask):
        return jnp.zeros((*ids.shape, 8))


class Parts:
    """VAE of ours; text is not what is compared."""

    def __init__(self, vae):
        self.vae, self.tokenizer, self.text_encoder = vae, self.tokens, NoText()

    @staticmethod
    def tokens(text, **options):
        return {"input_ids": np.zeros((1, 4)), "attention_mask": np.zeros((1, 4))}


@pytest.fixture(scope="module")
def theirs():
    sizes = dict(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    statistics = dict(
        latents_mean=np.linspace(-1, 1, 16).tolist(), latents_std=np.linspace(0.5, 2, 16).tolist()
    )
    vae = torch_models.vae(**sizes, **statistics)

    class Transformer:
        class config:
            patch_size = (1, 2, 2)

    pipe = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(),
        transformer=None,
    )
    pipe.transformer = Transformer
    return pipe


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.vae.save_pretrained(folder / "vae")
    return Parts(load_vae(folder))


def smooth(size, seed):
    """A picture with edges and slopes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def their_control(pipe, images, video=None, mask=None):
    with torch.no_grad():
        video, mask, references = pipe.preprocess_conditions(
            video, mask, images, 1, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu"
        )
        latents = pipe.prepare_video_latents(video, mask, references, None, "cpu")
        masks = pipe.prepare_masks(mask, references)
    canvases = np.stack([image.permute(1, 2, 0).numpy() for image in references[0]])
    return canvases, torch.cat([latents, masks], dim=1)[0].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("people", [1, 2, 3])
@pytest.mark.parametrize("first", range(len(SIZES)))
def test_canvas_and_control_equal_diffusers(theirs, ours, tmp_path, people, first):
    images = [smooth(SIZES[(first + k) % len(SIZES)], 10 * first + k) for k in range(people)]
    paths = [tmp_path / f"{k}.png" for k in range(people)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    canvases, want = their_control(theirs, images)
    for image, canvas in zip(images, canvases, strict=True):
        np.testing.assert_allclose(conditioning.canvas(image, HEIGHT, WIDTH), canvas, atol=5e-6)

    config = Config(
        data=DataConfig(max_people=3, text_length=4),
        video=VideoConfig(frames=FRAMES, height=HEIGHT, width=WIDTH),
    )
    got = np.asarray(
        conditioning.encode(
            ours, [Prompt(0, "", tuple(paths))], config, conditioning.Cache()
        ).control[0]
    )
    frames = people + 3
    assert want.shape == got[:frames].shape
    assert np.linalg.norm(got[:frames] - want) <= 1e-6 * np.linalg.norm(want)
    assert not got[frames:].any()
    if people > 1:  # the order matters, so a wrong one would be seen
        assert np.linalg.norm(got[:people][::-1] - want[:people]) > 0.05 * np.linalg.norm(
            want[:people]
        )


MASKS = {
    "without": lambda y, x, n: None,
    "everything": lambda y, x, n: np.ones_like(x),
    "nothing": lambda y, x, n: np.zeros_like(x),
    "half": lambda y, x, n: x < WIDTH / 2,
    "moving": lambda y, x, n: (np.abs(y - 40) < 17) & (np.abs(x - 10 * n) < 13),
}


@pytest.mark.parametrize("people", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
def test_control_videos_and_masks_equal_diffusers(
    theirs, ours, tmp_path, monkeypatch, people, kind
):
    """Both get the frames that our reader returns: codecs and resizing are not compared."""
    images = [smooth((WIDTH, HEIGHT), k) for k in range(people)]
    paths = [tmp_path / f"{k}.png" for k in range(people)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = [smooth((WIDTH, HEIGHT), 50 + n) for n in range(FRAMES)]
    mask = [MASKS[kind](y, x, n) for n in range(FRAMES)]
    given = None
    if mask[0] is not None:
        given = [Image.fromarray(np.uint8(255 * part)).convert("RGB") for part in mask]
    _, want = their_control(theirs, images, frames, given)

    stored = {"control.mp4": frames, "mask.mp4": given}

    def read(path, count, size, fps):
        pixels = np.stack([np.asarray(frame) for frame in stored[path.name]])
        return from_uint8(pixels)

    monkeypatch.setattr(controls, "read_frames", read)
    config = Config(
        data=DataConfig(max_people=3, text_length=4),
        video=VideoConfig(frames=FRAMES, height=HEIGHT, width=WIDTH),
    )
    prompt = Prompt(
        0,
        "",
        tuple(paths),
        control=tmp_path / "control.mp4",
        mask=None if given is None else tmp_path / "mask.mp4",
    )
    cache = conditioning.Cache()
    got = np.asarray(conditioning.encode(ours, [prompt], config, cache).control[0])
    assert got[: people + 3].shape == want.shape
    assert np.linalg.norm(got[: people + 3] - want) <= 1e-5 * np.linalg.norm(want)
    assert not got[people + 3 :].any()
    monkeypatch.undo()  # the files do not exist: the second time comes from the cache
    again = np.asarray(conditioning.encode(ours, [prompt], config, cache).control[0])
    np.testing.assert_array_equal(again, got)


def test_rows_with_and_without_control_do_not_depend_on_one_another(ours, tmp_path):
    smooth((WIDTH, HEIGHT), 3).save(tmp_path / "a.png")
    frames = np.stack([np.asarray(smooth((WIDTH, HEIGHT), 60 + n)) for n in range(FRAMES)])
    write_video(tmp_path / "control.mp4", frames, 16)
    config = Config(
        data=DataConfig(max_people=3, text_length=4),
        video=VideoConfig(frames=FRAMES, height=HEIGHT, width=WIDTH, fps=16),
    )
    photo = (tmp_path / "a.png",)
    plain, led = Prompt(0, "", photo), Prompt(1, "", photo, control=tmp_path / "control.mp4")

    def controls_of(*prompts):
        return conditioning.encode(ours, prompts, config, conditioning.Cache()).control

    both = controls_of(plain, led)
    np.testing.assert_array_equal(both[:1], controls_of(plain))
    np.testing.assert_array_equal(both[1:], controls_of(led))
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_places_are_the_control_of_their_drawing(theirs, ours, tmp_path):
    """Rows with boxes equal diffusers' given the drawn video; the other rows stay bit for bit."""
    images = [smooth((WIDTH, HEIGHT), k) for k in range(2)]
    photos = (tmp_path / "a.png", tmp_path / "b.png")
    for image, path in zip(images, photos, strict=True):
        image.save(path)
    left, right = (0.0, 0.1, 0.4, 1.0), (0.5, 0.2, 1.0, 0.9)
    places = Places(boxes=((left, right), (right, right)))
    video = VideoConfig(frames=FRAMES, height=HEIGHT, width=WIDTH, fps=16)
    config = Config(data=DataConfig(max_people=2, text_length=4), video=video)
    plain, boxes = Prompt(0, "", photos), Prompt(1, "", photos, places=places)
    empty, order = (Prompt(2 + n, "", photos, places=Places(order=(1, 2)[:n])) for n in (0, 2))
    cache = conditioning.Cache()
    got = conditioning.encode(ours, [plain, boxes, empty, order], config, cache).control
    assert [name for name in cache.photos if "places" in name] == [("places", places, True, video)]
    alone = conditioning.Cache()
    expected = conditioning.encode(ours, [plain], config, alone).control[0]
    assert set(cache.photos) - set(alone.photos) == {("places", places, True, video)}
    for row in (0, 2, 3):
        np.testing.assert_array_equal(got[row], expected)

    drawn = draw_places(places, FRAMES, (HEIGHT, WIDTH), coloured=True)
    frames = [Image.fromarray(frame) for frame in np.rint((drawn + 1) * 127.5).astype(np.uint8)]
    _, want = their_control(theirs, images, frames, None)
    assert np.linalg.norm(got[1][: len(want)] - want) <= 1e-5 * np.linalg.norm(want)

    black = Config(
        data=DataConfig(max_people=2, text_length=4, places_colours="black"), video=video
    )
    other = conditioning.encode(ours, [boxes], black, cache).control
    assert np.abs(got[1] - other[0]).max() > 0.1
