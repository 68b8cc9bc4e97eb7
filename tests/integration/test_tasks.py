"""Tasks text and transformer: the tokenizer, what their batches hold, and that their losses are the ones they claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from jax_idgrpo.config import (
    Config,
    FinetuneConfig,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.synthetic import captions
from jax_idgrpo.synthetic.training import text, transformer
from jax_idgrpo.training.task import make_task
from tests.helpers.tasks import BATCH, DATA, make_config

# ---- text ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer(text.vocabulary(DATA.negative_prompt))


def test_tokenizer_is_t5_like_and_survives_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    texts = ["A person , with RED hair.", "a zeppelin", DATA.negative_prompt]
    ids, mask = text.tokenize(loaded, texts, 8)
    np.testing.assert_array_equal(ids, text.tokenize(tokenizer, texts, 8)[0])
    words = loaded.get_vocab()
    assert ids[0].tolist() == [
        *(words[word] for word in ["a", "person", "with", "red", "hair"]),
        1,
        0,
        0,
    ]
    assert mask[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert ids[1].tolist() == [words["a"], 2, 1, 0, 0, 0, 0, 0]
    assert ids[2, -1] == 1  # cut, with its end kept
    assert 2 not in ids[2]


def test_tokenizer_refuses_what_it_would_split():
    for word in ("two words", "comma,", "Upper", ""):
        with pytest.raises(ValueError, match="not single lower-case words"):
            text.build_tokenizer(["fine", word])


def test_no_prompt_of_the_cast_has_an_unknown_word(tokenizer):
    content = [text._draw(3, step, BATCH) for step in range(8)]
    prompts = [
        prompt
        for part in content
        for prompt in captions.describe(part.scene, part.people, part.mask)
    ]
    ids, mask = text.tokenize(tokenizer, prompts, DATA.text_length)
    assert 2 not in ids
    assert (ids[np.arange(len(ids)), mask.sum(axis=1) - 1] == 1).all()


def test_attributes_are_those_of_the_people_that_are_there():
    content = jax.device_get(text._draw(3, 5, BATCH))
    got = text.attributes(content)
    person = got[:, : 3 * 9].reshape(-1, 3, 9)
    assert ((person >= 0) == content.mask[..., None]).all()
    assert (person[content.mask][:, 8] == content.scene.action[content.mask]).all()
    assert got.max() < text.CLASSES
    assert (got[:, 27:] >= 0).all()


def test_reader_learns_and_its_batches_are_pure():
    options = dict(d_model=32, d_kv=8, num_heads=2, d_ff=32, num_layers=1)
    task = make_task(
        Config(data=DATA, finetune=FinetuneConfig(task="text", batch=BATCH, options=options))
    )
    first, again, other = task.batch(1, 2), task.batch(1, 2), task.batch(1, 3)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["ids"] != other["ids"]).any()
    graph, params = nnx.split(task.init(jax.random.key(0)))
    step = jax.jit(
        jax.value_and_grad(lambda p: task.loss(nnx.merge(graph, p), first, jax.random.key(0))[0])
    )
    start, gradient = step(params)
    for _ in range(10):
        params = jax.tree.map(lambda p, g: p - 0.05 * jnp.sign(g), params, gradient)
        value, gradient = step(params)
    assert 2.6 < start < 3.2  # log 16 = 2.77: it starts with no opinion
    assert value < start - 0.5


# ---- transformer ---------------------------------------------------------------------------------------------------------


def test_weight_of_cells_is_the_share_that_a_face_covers():
    boxes = np.zeros((1, 5, 2, 4), np.float32)
    boxes[0, :, 0] = (8, 0, 20, 16)  # columns 1 and half of 2, rows 0 and 1
    boxes[0, :, 1] = (
        -9,
        24,
        8,
        99,
    )  # reaches out of the picture; hidden in all frames but the first
    visible = np.array([[[1, 1], [1, 0], [1, 0], [0, 0], [0, 0]]], np.float32)
    weight = np.asarray(
        transformer.cell_weight(jnp.asarray(boxes), jnp.asarray(visible), (32, 32), 5.0)
    )
    first = np.ones((4, 4))
    first[:2, 1], first[:2, 2], first[3, 0] = 5, 3, 5
    later = np.ones((4, 4))  # in two of four frames
    later[:2, 1], later[:2, 2] = 3, 2
    np.testing.assert_allclose(weight[0], [first, later], rtol=1e-6)


def pool(rows=40):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float16)  # noqa: E731
    return transformer.Pool(
        video=draw(rows, 2, 4, 4, 16), photos=draw(rows, 3, 4, 4, 16), text=draw(rows, 5, 8), weight=1 + abs(draw(rows, 2, 4, 4)),
        people=np.arange(rows, dtype=np.int32) % 3 + 1, grey=draw(2, 4, 4, 16), negative=draw(5, 8),
    )  # fmt: skip


def test_batches_hold_equally_many_people_and_sometimes_the_negative_prompt():
    made = pool()
    rows = {count: np.flatnonzero(made.people == count) for count in (1, 2, 3)}
    batches = [transformer.pick(made, rows, 16, 0.25, 0.0, seed=1, step=step) for step in range(30)]
    assert {batch["photos"].shape[1] for batch in batches} == {1, 2, 3}
    for batch in batches:
        people = batch["photos"].shape[1]
        members = [
            np.flatnonzero((made.video == row).all(axis=(1, 2, 3, 4)))[0]
            for row in batch["video"].astype(np.float16)
        ]
        assert (made.people[members] == people).all()
    dropped = np.mean(
        [(batch["text"] == made.negative.astype(np.float32)).all(axis=(1, 2)) for batch in batches]
    )
    assert 0.15 < dropped < 0.35
    again = transformer.pick(made, rows, 16, 0.25, 0.0, seed=1, step=4)
    for name in again:
        np.testing.assert_array_equal(again[name], batches[4][name])


def test_some_batches_have_no_photos_and_train_text_to_video():
    made = pool()
    rows = {count: np.flatnonzero(made.people == count) for count in (1, 2, 3)}
    batches = [transformer.pick(made, rows, 4, 0.0, 0.3, seed=1, step=step) for step in range(60)]
    shown = np.array([batch["photos"].shape[1] for batch in batches])
    assert 0.15 < np.mean(shown == 0) < 0.45
    frames = []

    def network(latents, timesteps, text, control):
        frames.append(latents.shape[1])
        return jnp.zeros_like(latents)

    without = batches[int(np.flatnonzero(shown == 0)[0])]
    value, _ = transformer.loss(
        network,
        without,
        jax.random.key(0),
        grey=jnp.zeros((2, 4, 4, 16)),
        order="diffusers",
        shift=3.0,
    )
    assert frames == [2]  # the video's own: there is no slot for a photo
    assert value > 0.5


def test_phantom_sees_clean_photos_behind_the_video_and_zeros_without_them():
    made = pool()
    rows = {count: np.flatnonzero(made.people == count) for count in (1, 2, 3)}
    batches = [
        transformer.pick(made, rows, 64, 0.0, 0.5, seed=1, step=step, blank=True)
        for step in range(8)
    ]
    blank = [not batch["photos"].any() for batch in batches]
    assert {batch["photos"].shape[1] for batch in batches} <= {1, 2, 3}
    assert 0 < sum(blank) < 8
    batch = batches[blank.index(False)] | {"video": np.full((64, 2, 4, 4, 16), 0.7, np.float32)}
    seen = {}

    def right(latents, timesteps, text):
        seen.update(latents=latents)
        return (latents - 0.7) / ((timesteps + 0.5) / 1000)[:, None, None, None, None]

    value, metrics = transformer.loss(
        right, batch, jax.random.key(0), grey=None, order="diffusers", shift=3.0
    )
    # Only the video is denoised, so the velocity on the photos does not count.
    assert value < 1e-2
    assert metrics["video_error"] < 1e-2
    np.testing.assert_array_equal(seen["latents"][:, 2:], batch["photos"])


def test_the_right_velocity_has_no_loss_and_the_control_holds_the_photos():
    """With x0 = c everywhere the velocity is (x - c) / sigma, and sigma is the timestep over 1000."""
    c, rows, people = 0.7, 64, 2
    seen = {}

    def right(latents, timesteps, text, control):
        seen.update(timesteps=timesteps, control=control, latents=latents)
        return (latents - c) / ((timesteps + 0.5) / 1000)[:, None, None, None, None]

    batch = dict(
        video=np.full((rows, 3, 4, 4, 16), c, np.float32), photos=np.full((rows, people, 4, 4, 16), c, np.float32),
        text=np.zeros((rows, 5, 8), np.float32), weight=np.full((rows, 3, 4, 4), 2.0, np.float32),
    )  # fmt: skip
    grey = np.random.default_rng(0).normal(size=(3, 4, 4, 16)).astype(np.float32)
    options = dict(grey=jnp.asarray(grey), order="diffusers", shift=3.0)
    value, metrics = transformer.loss(right, batch, jax.random.key(0), **options)
    # What is left: t is sigma cut to whole thousandths, coarse for small sigma.
    assert value < 1e-2
    assert metrics["video_error"] < 1e-2
    wrong, _ = transformer.loss(
        lambda *inputs: -right(*inputs), batch, jax.random.key(0), **options
    )
    assert wrong > 3
    assert seen["latents"].shape == (rows, people + 3, 4, 4, 16)
    np.testing.assert_array_equal(seen["control"][:, :people, ..., :16], batch["photos"])
    np.testing.assert_array_equal(seen["control"][0, people:, ..., 16:32], grey)
    u = np.asarray(seen["timesteps"]) / 1000
    assert (u[1:] > u[:-1]).all()
    assert 0.7 < np.median(u) < 0.8  # shift 3 puts the middle at 0.75


def test_faces_weigh_more():
    batch = transformer.pick(
        pool(), {k: np.arange(k - 1, 40, 3) for k in (1, 2, 3)}, 8, 0.0, 0.0, 0, 0
    )
    people = batch["photos"].shape[1]
    mark = np.zeros((8, people + 2, 4, 4, 16), np.float32)
    mark[:, people:, 1, 1] = 50.0  # an error in one cell of every video frame

    def loss(weight):
        field = np.ones((8, 2, 4, 4), np.float32)
        field[:, :, 1, 1] = weight
        options = dict(grey=jnp.zeros((2, 4, 4, 16)), order="diffusers", shift=3.0)
        return transformer.loss(
            lambda *inputs: jnp.asarray(mark),
            batch | {"weight": field},
            jax.random.key(0),
            **options,
        )[0]

    assert loss(4.0) > 2 * loss(1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory)


def test_mistakes_in_the_options_are_one_line(config, monkeypatch):
    monkeypatch.setattr(transformer, "CHUNK", 4)

    def changed(section="finetune", **values):
        return dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **values)}
        )

    options = config.finetune.options
    with pytest.raises(
        UserError,
        match=r"finetune.options of task transformer: got an unexpected keyword argument 'face_wait'",
    ):
        make_task(changed(options=options | {"face_wait": 1}))
    with pytest.raises(UserError, match="pool is 7; use a multiple of"):
        make_task(changed(options=options | {"pool": 7}))
    with pytest.raises(UserError, match=r"rollout.shift is 0; .* such as 3.0"):
        make_task(changed("rollout", shift=0.0))
