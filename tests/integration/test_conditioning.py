"""Conditioning: layout of the control, what padding may not change, and images of every kind."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jax_idgrpo.config import EMBEDDED, Config, DataConfig, MeshConfig, VideoConfig
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.parallel import sharding
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.cache import PHOTO_ROOM, ROOM
from jax_idgrpo.sampling.pipeline import load_pipeline
from tests.helpers.decodes import count_decodes

HEIGHT, WIDTH, FRAMES = 32, 48, 5


class WordLengths:
    """A tokenizer whose ids are the lengths of the words."""

    def __call__(
        self, text, *, padding=False, max_length=None, truncation=False, return_tensors=None
    ):
        ids = [len(word) for word in text.split()]
        if max_length is None:
            return {"input_ids": [*ids, 1]}
        assert (padding, truncation, return_tensors) == ("max_length", True, "np")
        ids = [*ids[: max_length - 1], 1]
        pad = [0] * (max_length - len(ids))
        return {
            "input_ids": np.array([ids + pad]),
            "attention_mask": np.array([[1] * len(ids) + pad]),
        }

    def decode(self, ids, *, skip_special_tokens):
        return " ".join("x" * number for number in (ids[:-1] if skip_special_tokens else ids))


class Lookup(nnx.Module):
    """A text encoder that looks its ids up, and counts how often it is traced or run."""

    def __init__(self):
        self.table = nnx.Param(jax.random.normal(jax.random.key(3), (32, 8)))

    def __call__(self, ids, mask):
        return self.table[...][ids] * mask[..., None]


class Pipe:
    def __init__(self):
        statistics = dict(latents_mean=(0.1,) * 16, latents_std=(1.5,) * 16)
        config = VAEConfig(
            base_dim=4,
            dim_mult=(1, 1, 2, 2),
            num_res_blocks=1,
            temporal_downsample=(False, True, True),
            **statistics,
        )
        self.vae, self.text_encoder, self.tokenizer = (
            WanVAE(config, rngs=nnx.Rngs(0)),
            Lookup(),
            WordLengths(),
        )


def write_image(path, size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def pipe():
    return Pipe()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    files = [write_image(folder / f"{k}.png", (30 + 11 * k, 50 - 7 * k), k) for k in range(4)]
    return [
        Prompt(7, "a person waves", (files[0],)),
        Prompt(9, "two people , one nods", (files[1], files[2])),
        Prompt(4, "three", tuple(files[1:])),
    ]


@pytest.fixture(scope="module")
def config():
    return Config(
        data=DataConfig(max_people=3, text_length=6),
        video=VideoConfig(frames=FRAMES, height=HEIGHT, width=WIDTH),
    )


def test_layout_of_rows_with_different_numbers_of_people(pipe, prompts, config):
    got = conditioning.encode(pipe, prompts, config, conditioning.Cache())
    frames = (FRAMES - 1) // 4 + 1
    assert got.control.shape == (3, 3 + frames, HEIGHT // 8, WIDTH // 8, 96)
    assert got.latent_shape == (3 + frames, HEIGHT // 8, WIDTH // 8, 16)
    assert got.references.tolist() == [1, 2, 3]
    grey = pipe.vae.encode(jnp.zeros((1, FRAMES, HEIGHT, WIDTH, 3)))[0]
    for prompt, row, mask in zip(prompts, got.control, got.frame_mask, strict=True):
        people = len(prompt.references)
        assert mask.tolist() == [True] * (people + frames) + [False] * (3 - people)
        for slot, path in enumerate(reversed(prompt.references)):  # last photo first
            photo = conditioning.canvas(load_reference(path), HEIGHT, WIDTH)
            np.testing.assert_allclose(
                row[slot, ..., :16], pipe.vae.encode(photo[None, None])[0, 0], atol=1e-5
            )
        assert not row[:people, ..., 16:].any()
        video = row[people : people + frames]
        np.testing.assert_allclose(video[..., :16], grey, atol=1e-5)
        np.testing.assert_array_equal(video[..., :16], video[..., 16:32])
        assert (video[..., 32:] == 1).all()
        assert not row[people + frames :].any()


def test_reference_order_is_an_option(pipe, prompts, config):
    original = Config(
        data=DataConfig(max_people=3, text_length=6, reference_order="original"), video=config.video
    )
    one, other = (
        conditioning.encode(pipe, prompts[2:], c, conditioning.Cache()).control[0]
        for c in (config, original)
    )
    np.testing.assert_array_equal(one[:3], other[:3][::-1])
    assert np.abs(one[:3] - other[:3]).max() > 0.1


def test_each_prompt_is_encoded_once_and_each_photo_decoded_once(
    pipe, prompts, config, monkeypatch
):
    decoded = count_decodes(monkeypatch)
    cache = conditioning.Cache()
    first = conditioning.encode(pipe, prompts, config, cache)
    again = conditioning.encode(pipe, prompts[::-1], config, cache)
    assert list(decoded.values()) == [1] * 4, "distinct photos"
    np.testing.assert_array_equal(first.control[::-1], again.control)
    np.testing.assert_array_equal(first.text[::-1], again.text)


def test_what_is_encoded_waits_on_the_host_and_takes_bounded_room(
    pipe, prompts, config, monkeypatch
):
    decoded = count_decodes(monkeypatch)
    whole, none = conditioning.Cache(), conditioning.Cache(room=1000)
    first = conditioning.encode(pipe, prompts, config, whole)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first))
    assert 0 < ROOM - whole.room < first.control.nbytes, "padding and masks are kept as well"
    latents = HEIGHT // 8 * (WIDTH // 8) * 16 * 4
    assert PHOTO_ROOM - whole.photos.room == 4 * latents
    for _ in range(2):
        got = conditioning.encode(pipe, prompts, config, none)
        jax.tree.map(np.testing.assert_array_equal, got, first)
    assert list(decoded.values()) == [2] * 4, "once per cache"


def test_a_photo_is_decoded_once_even_if_its_prompt_is_encoded_again(
    pipe, prompts, config, monkeypatch
):
    decoded = count_decodes(monkeypatch)
    cache = conditioning.Cache(room=0)
    first = conditioning.encode(pipe, prompts, config, cache)
    again = conditioning.encode(pipe, prompts, config, cache)
    assert list(decoded.values()) == [1] * 4
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_photos_that_do_not_fit_are_decoded_again_and_give_the_same(
    pipe, prompts, config, monkeypatch
):
    want = conditioning.encode(pipe, prompts, config, conditioning.Cache())
    decoded = count_decodes(monkeypatch)
    cache = conditioning.Cache(photo_room=5000)  # three photos of 1536 bytes each
    for _ in range(2):
        got = conditioning.encode(pipe, prompts, config, cache)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    latents = HEIGHT // 8 * (WIDTH // 8) * 16 * 4
    assert cache.photos.room == 5000 - 3 * latents >= 0
    assert sorted(decoded.values())[:3] == [1] * 3
    assert max(decoded.values()) > 1


def test_a_decoded_photo_is_encoded_as_its_file_and_sizes_do_not_mix(
    pipe, prompts, config, monkeypatch
):
    small = dataclasses.replace(config, video=dataclasses.replace(config.video, height=16))
    want = [
        conditioning.encode(pipe, prompts, each, conditioning.Cache()) for each in (config, small)
    ]
    images = {file: load_reference(file) for prompt in prompts for file in prompt.references}
    decoded, cache = count_decodes(monkeypatch), conditioning.Cache()
    for each in (config, small):
        encode = conditioning.photo_encoder(pipe, each, cache, prompts)
        for file, image in images.items():
            encode(file, image)
    got = [conditioning.encode(pipe, prompts, each, cache) for each in (config, small)]
    assert not decoded, "the second pass opens no photo"
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_photo_is_encoded_ahead_once_the_cache_is_full(pipe, prompts, config, monkeypatch):
    cache = conditioning.Cache(photo_room=0)
    image = load_reference(prompts[0].references[0])
    encode = conditioning.photo_encoder(pipe, config, cache, prompts)
    encode(prompts[0].references[0], image)
    monkeypatch.setattr(conditioning, "encode_video", None)
    encode(prompts[1].references[0], image)
    encode(Path("of-no-prompt.png"), image)
    assert not cache.photos


def test_what_a_prompt_loses_is_told_once_with_its_line():
    tokenizer = WordLengths()
    long = Prompt(
        3, "one two three four five sixth seventh", (Path("a.png"),), where="prompts p.csv, line 5"
    )
    fits = Prompt(4, "one two three four five", (Path("a.png"),), where="prompts p.csv, line 6")
    with pytest.warns(UserWarning, match="the prompt has 8 tokens") as told:
        conditioning.warn_of_cut(tokenizer, [long, fits], 6)
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith(
        "prompts p.csv, line 5: the prompt has 8 tokens, and data.text_length keeps 6"
    )
    assert line.endswith("cut off: xxxxx xxxxxxx")
    with pytest.warns(UserWarning, match="15 more prompts") as told:
        conditioning.warn_of_cut(tokenizer, [long] * 25, 6)
    assert len(told) == conditioning.CUT_SHOWN + 1
    assert "15 more prompts" in str(told[-1].message)


def test_a_cut_negative_prompt_is_told(pipe):
    with pytest.warns(
        UserWarning,
        match="data.negative_prompt: has 4 tokens, and data.text_length keeps 3.* cut off: xxxx$",
    ):
        conditioning.encode_negative(
            pipe, DataConfig(text_length=3, negative_prompt="ugly blurry dark")
        )


def test_room_for_people_that_no_prompt_has_is_told(prompts, recwarn):
    conditioning.warn_of_padding(prompts, 3)
    assert not recwarn.list
    with pytest.warns(
        UserWarning,
        match="no prompt has more people than 2.*data.max_people 3; --data.max_people 2",
    ):
        conditioning.warn_of_padding(prompts[:2], 3)


def test_text_is_cut_padded_and_float32(pipe, prompts, config):
    text = conditioning.encode(pipe, prompts, config, conditioning.Cache()).text
    assert text.shape == (3, 6, 8)
    assert text.dtype == jnp.float32
    assert not text[0, 4:].any()
    assert text[0, :4].any(axis=-1).all()


def test_groups_and_video_frames(pipe, prompts, config):
    got = conditioning.select(
        conditioning.encode(pipe, prompts, config, conditioning.Cache()), np.repeat(np.arange(3), 2)
    )
    assert got.references.tolist() == [1, 1, 2, 2, 3, 3]
    x = jnp.broadcast_to(jnp.arange(5.0)[None, :, None, None, None], (6, 5, 2, 2, 16))
    video = conditioning.video_latents(x, jnp.asarray(got.references), 2)
    assert video[:, :, 0, 0, 0].tolist() == [[1, 2], [1, 2], [2, 3], [2, 3], [3, 4], [3, 4]]


def test_too_many_people_is_one_line(pipe, prompts, config):
    narrow = Config(data=DataConfig(max_people=2, text_length=6), video=config.video)
    with pytest.raises(
        UserError, match="prompt 4: has 3 reference photos; data.max_people allows 1 to 2"
    ):
        conditioning.encode(pipe, prompts, narrow, conditioning.Cache())


@pytest.mark.parametrize("size", [(3, 500), (700, 5), (1, 1), (9, 9)])
def test_canvas_of_odd_sizes(size):
    got = conditioning.canvas(Image.new("L", size, 0), HEIGHT, WIDTH)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert got.dtype == np.float32
    assert got.min() == -1
    assert got.max() <= 1


def test_negative_prompt_from_a_file(tmp_path):
    assert conditioning.negative_prompt(DataConfig(negative_prompt="blurry")) == "blurry"
    (tmp_path / "n.txt").write_text("grey , static\n", encoding="utf-8")
    assert (
        conditioning.negative_prompt(DataConfig(negative_prompt=f"@{tmp_path}/n.txt"))
        == "grey , static"
    )
    with pytest.raises(UserError, match="data.negative_prompt: cannot read"):
        conditioning.negative_prompt(DataConfig(negative_prompt=f"@{tmp_path}/none.txt"))


def test_a_text_encoder_that_waits_in_the_hosts_memory_says_the_same():
    folder = EMBEDDED / "pipeline"
    mesh = sharding.make_mesh(MeshConfig())
    ready, waiting = (
        load_pipeline(folder, mesh=mesh, text_memory=memory) for memory in ("device", "host")
    )

    def kinds(pipe):
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(pipe.text_encoder))}

    texts = ["a person waves", "two people , one nods"]
    assert kinds(ready) == {"device"}
    assert kinds(waiting) == {"pinned_host"}
    got, want = (conditioning.encode_texts(pipe, texts, 20) for pipe in (waiting, ready))
    assert all(len(text) < 20 and text.any(-1).all() for text in want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert kinds(waiting) == {"pinned_host"}
