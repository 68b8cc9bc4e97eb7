"""The vision-language reward: the published chain of sizes, pixels and words; whole scores as in torch; rows that stand alone."""

import functools

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import VisionConfig
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.vlm import files, inputs
from jax_idgrpo.rewards.vlm.reward import VlmReward, load_vlm
from jax_idgrpo.rewards.vlm.settings import Settings
from tests.helpers import vlm_folders

TOKEN = "<|SA_reward|>"
TEXT = f"\nHow alike are the faces \u2013 of all pictures?\n{TOKEN}\nEND\n"
VISION = VisionConfig(depth=4, width=32, heads=2, ffn=48, full_blocks=(1, 3))
MOST = 399_360


def photo(seed, height, width):
    """A smooth picture with some noise, RGB."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return Image.fromarray(
        np.clip(np.asarray(small, int) + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(
            np.uint8
        )
    )


def film(seed, frames=9, height=64, width=96):
    """uint8 [F,H,W,3]."""
    return np.stack([np.asarray(photo(100 * seed + n, height, width)) for n in range(frames)])


def values(pixels):
    """As a video in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


# ---- the published chain, written out in torch ---------------------------------------------------------------------------


def chain_frames(pixels, indices, size):
    """Chosen frames -> resized as torchvision does for uint8: in float, clamped and rounded; then normalised patches."""
    chosen = torch.from_numpy(pixels[indices]).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(
        chosen, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return chain_patches(resized.clamp(0, 255).round())


def chain_patches(frames):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = (frames / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    t, h, w = x.shape[0] // 2, x.shape[2] // 14, x.shape[3] // 14
    x = x.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1).numpy(), (t, h, w)


def chain_ids(shapes, grid):
    """The chat template, its pads repeated, tokenised."""
    words = vlm_folders.tokenizer()
    words.add_tokens([TOKEN], special_tokens=True)
    content = [
        *({"type": "image"} for _ in shapes),
        {"type": "video"},
        {"type": "text", "text": TEXT},
    ]
    text = words.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        add_vision_id=True,
    )
    for h, w in shapes:
        text = text.replace("<|image_pad|>", "<|held|>" * (h * w // 4), 1)
    text = text.replace("<|held|>", "<|image_pad|>").replace(
        "<|video_pad|>", "<|video_pad|>" * (np.prod(grid) // 4)
    )
    return words(text)["input_ids"]


@pytest.mark.parametrize(
    ("size", "most", "want"),
    [
        ((240, 416), MOST, (252, 420)),
        ((480, 832), MOST, (476, 812)),
        ((1024, 1024), MOST, (616, 616)),
        ((512, 512), MOST, (504, 504)),
    ],
)
def test_published_sizes(size, most, want):
    assert inputs.smart_resize(*size, (3136, most)) == want


@pytest.mark.parametrize(
    ("total", "want", "step"), [(33, [0, 11, 21, 32], 3), (81, [0, 27, 53, 80], 8)]
)
def test_published_frames_and_steps(total, want, step):
    assert inputs.frame_indices(total, 5.0).tolist() == want
    assert int(inputs.seconds_per_grid(total, 10.0, 4) * 2) == step


def test_frames_by_rate_are_even_and_bounded():
    counts = [len(inputs.frame_indices(total, 0.0, 2.0, 10.0)) for total in (5, 33, 81)]
    assert counts == [4, 6, 10]
    with pytest.raises(UserError, match="needs 2 to 1"):
        inputs.frame_indices(1, 5.0)


@pytest.mark.parametrize(("height", "width"), [(150, 97), (480, 700), (900, 1300), (28, 56)])
def test_photos_are_the_processors(height, width):
    image = photo(height, height, width)
    got, grid = inputs.picture(image, VISION, MOST)
    size = inputs.smart_resize(height, width, (3136, MOST))
    given = image.resize(
        size[::-1], Image.Resampling.BICUBIC
    )  # what qwen_vl_utils hands to the processor
    found = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)(
        images=[given], return_tensors="np"
    )
    assert found["image_grid_thw"].tolist() == [[1, *grid]]
    np.testing.assert_allclose(got, found["pixel_values"], atol=1e-3)


def test_frames_are_those_of_the_chain():
    pixels = np.stack([film(1, 9, 120, 208), film(2, 9, 120, 208)])
    chosen = inputs.frame_indices(9, 5.0)
    size = inputs.frame_size(120, 208, VISION, MOST)
    got = jax.jit(lambda videos: inputs.frames_of(videos, chosen, VISION, MOST))(values(pixels))
    for row, video in enumerate(pixels):
        want, grid = chain_frames(video, chosen, size)
        found = np.asarray(got.patches[2 * row : 2 * row + 2, : grid[1] * grid[2]]).reshape(
            want.shape
        )
        differing = np.abs(found - want) > 1e-3
        assert differing.mean() < 1e-4
        assert np.abs(found - want).max() < 1.1 / 255 / 0.26


def test_ids_are_those_of_the_template():
    words = vlm_folders.tokenizer()
    words.add_tokens([TOKEN], special_tokens=True)
    got, kinds, places = inputs.Prompting(words, TEXT, (TOKEN,)).tokens([6, 64], 270, "")
    want = chain_ids([(4, 6), (16, 16)], (2, 18, 30))
    assert got.tolist() == want[: len(got)]
    assert want[len(got) - 1] == want[places[0]] == words.convert_tokens_to_ids(TOKEN)
    assert np.sum(kinds == 1) == 70
    assert np.sum(kinds == 2) == 270
    everything, _, last = inputs.Prompting(words, TEXT.replace(TOKEN, ""), ()).tokens(
        [6, 64], 270, ""
    )
    assert last[0] == len(everything) - 1
    assert everything.tolist() == [token for token in want if token != want[places[0]]]


# ---- whole scores --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released folder and its torch network."""
    root = tmp_path_factory.mktemp("vlm")
    vlm_folders.write_base(root / "base")
    wrapped = vlm_folders.write_released(root / "base", root / "reward")
    (root / "reward" / "prompt.txt").write_text(TEXT, "utf-8")
    return root, wrapped


@functools.cache
def batch():
    """Photos of three rows (two, one and three people) and their videos."""
    photos = (
        (photo(1, 60, 90), photo(2, 140, 100)),
        (photo(3, 200, 120),),
        (photo(4, 70, 70), photo(5, 64, 130), photo(6, 56, 84)),
    )
    return photos, np.stack([film(n) for n in range(3)])


def references(photos, slots=4):
    return References(tuple(tuple(map(Photo, row)) for row in photos), slots)


def scores(reward, videos, references, prompts):
    """All terms, on the host."""
    encoded = reward.encode_references(references, prompts, videos.shape[1:4])
    return {name: np.asarray(value) for name, value in reward.score(videos, encoded).items()}


def reward(released, **changes):
    root, _ = released
    with pytest.warns(UserWarning, match="not the published text"):
        return load_vlm(
            RewardConfig(
                **(
                    dict(vlm=str(root / "reward"), vlm_base=str(root / "base"), vlm_dtype="float32")
                    | changes
                )
            )
        )


def test_scores_are_those_of_torch_on_the_published_chain(released):
    photos, videos = batch()
    got = scores(reward(released), values(videos), references(photos), [""] * 3)["reward"]
    model = released[1].base_model.model
    chosen = inputs.frame_indices(9, 5.0)
    seconds = torch.tensor([inputs.seconds_per_grid(9, 10.0, 4)])
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    for row, (shown, video) in enumerate(zip(photos, videos, strict=True)):
        sizes = [inputs.smart_resize(image.height, image.width, (3136, MOST)) for image in shown]
        resized = [
            image.resize(size[::-1], Image.Resampling.BICUBIC) for image, size in zip(shown, sizes)
        ]
        found = processor(images=resized, return_tensors="pt")
        frames, grid = chain_frames(video, chosen, inputs.frame_size(64, 96, VISION, MOST))
        ids = torch.tensor([chain_ids([(h // 14, w // 14) for h, w in sizes], grid)])
        config = model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        with torch.no_grad():
            hidden = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=kinds,
                pixel_values=found["pixel_values"],
                pixel_values_videos=torch.from_numpy(frames),
                image_grid_thw=found["image_grid_thw"],
                video_grid_thw=torch.tensor([grid]),
                second_per_grid_ts=seconds,
            ).last_hidden_state
            want = model.rm_head(hidden)[0, :, 0][ids[0] == ids.max()].numpy()
        assert want.shape == (1,)
        np.testing.assert_allclose(got[row], want[0], rtol=1e-3, atol=2e-4)
    assert np.ptp(got) > 1e-2


def test_a_rows_score_does_not_depend_on_its_neighbours(released):
    photos, videos = batch()
    whole = reward(released)

    def scored(*given, by=whole):
        return scores(by, *given)["reward"]

    together = scored(values(videos), references(photos), [""] * 3)
    order = [2, 0, 1]
    permuted = scored(values(videos)[order], references([photos[n] for n in order]), [""] * 3)
    np.testing.assert_allclose(permuted, together[order], atol=1e-5)
    for row in range(3):
        alone = scored(values(videos)[row : row + 1], references(photos[row : row + 1], 3), [""])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
    longer = [
        photos[0],
        (photo(8, 320, 420),),
        photos[2],
    ]  # another bucket of pictures and of tokens
    np.testing.assert_allclose(
        scored(values(videos), references(longer), [""] * 3)[[0, 2]], together[[0, 2]], atol=1e-5
    )
    parts = scored(values(videos), references(photos), [""] * 3, by=reward(released, vlm_rows=2))
    np.testing.assert_allclose(parts, together, atol=1e-5)
    swapped = scored(values(videos), references([photos[0][::-1], photos[1], photos[2]]), [""] * 3)
    assert abs(swapped[0] - together[0]) > 1e-5
    assert np.allclose(swapped[1:], together[1:], atol=1e-5)


def test_photos_and_words_are_made_ready_once(released, monkeypatch):
    photos, _ = batch()
    scored, cut, asked = reward(released), [], []
    picture, question = inputs.picture, inputs.question
    monkeypatch.setattr(inputs, "picture", lambda *given: cut.append(0) or picture(*given))
    monkeypatch.setattr(inputs, "question", lambda *given: asked.append(0) or question(*given))
    first = scored.encode_references(references(photos), ["a", "b", "c"], (9, 64, 96))
    assert (len(cut), len(asked)) == (6, 3)
    again = scored.encode_references(
        references([*photos, photos[0]]), ["a", "b", "c", "d"], (9, 64, 96)
    )
    assert (len(cut), len(asked)) == (6, 4), "a known photo in another prompt is read once, too"
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other[:3]), first, again)
    other = scored.encode_references(references(photos), ["a", "b", "c"], (9, 96, 64))
    assert (len(cut), len(asked)) == (6, 7), "videos of another size are asked about anew"
    assert other.ids.shape[0] == 3


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_other_poolings_see_the_whole_turn_and_the_caption(released, pooling):
    settings = Settings(
        dimensions=("VQ", "MQ", "TA"),
        pooling=pooling,
        rank=0,
        alpha=0.0,
        mean=(1.0, 2.0, 3.0),
        deviation=(2.0, 2.0, 0.5),
    )
    model = files.start(released[0] / "base", settings, jax.random.key(3), "float32")
    photos, videos = batch()
    scored = VlmReward(model, "Does it show {text_prompt}?")
    terms = scores(scored, values(videos), references(photos), ["a dog"] * 3)
    first = terms["reward"]
    raw = [
        (terms[name] * deviation + mean)
        for name, mean, deviation in zip(("VQ", "MQ", "TA"), settings.mean, settings.deviation)
    ]
    np.testing.assert_allclose(first, sum(terms[name] for name in ("VQ", "MQ", "TA")), rtol=1e-6)
    assert set(scored.term_names) == set(terms)
    assert scored.reported == ("VQ", "MQ", "TA")
    assert terms["faces_asked"].tolist() == [len(row) for row in photos]
    assert np.abs(np.stack(raw)).max() < 10
    other = scores(scored, values(videos), references(photos), ["a dog", "two cats", "a dog"])[
        "reward"
    ]
    np.testing.assert_allclose(other[[0, 2]], first[[0, 2]], atol=1e-5)
    assert abs(other[1] - first[1]) > 1e-5


def test_a_prompt_that_is_not_the_models_is_refused(released, tmp_path):
    root = released[0]
    (tmp_path / "prompt.txt").write_text("no token")
    with (
        pytest.warns(UserWarning, match="is not the published text"),
        pytest.raises(UserError, match=r"holds <\|SA_reward\|> 0 times"),
    ):
        load_vlm(
            RewardConfig(
                vlm=str(root / "reward"),
                vlm_base=str(root / "base"),
                vlm_prompt=str(tmp_path / "prompt.txt"),
            )
        )
    with pytest.raises(UserError, match="no such file; pass the text"):
        load_vlm(
            RewardConfig(
                vlm=str(root / "reward"),
                vlm_base=str(root / "base"),
                vlm_prompt=str(tmp_path / "none"),
            )
        )


def test_the_text_of_a_python_file_is_read_without_running_it(tmp_path):
    path = tmp_path / "prompt_template.py"
    path.write_text("raise SystemExit\nDETAILED_PROMPT = '''say {text_prompt}'''\n")
    assert inputs.read_text(path, "detailed") == "say {text_prompt}"
    with pytest.raises(UserError, match="does not hold the text"):
        inputs.read_text(path, "subject_alignment_special")
