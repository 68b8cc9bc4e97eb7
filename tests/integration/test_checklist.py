"""The checklist reward: answers as transformers gives them, gates in whole scores, rows that stand alone, annotation, fitting."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.annotate import annotate
from jax_idgrpo.preferences.train_linear import train
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.vlm import inputs
from jax_idgrpo.rewards.vlm.checklist import CHECKLIST, read_checklist
from jax_idgrpo.rewards.vlm.checklist_reward import load_checklist
from tests.helpers import vlm_folders, vlm_pairs

QUESTIONS = [
    {"question": "Is a face seen?", "dimension": "face"},
    {"question": "Is the hair that of every picture?", "dimension": "hair", "gate": 1, "weight": 2},
    {"question": "Is it {text_prompt}?", "dimension": "text", "weight": 0.5},
]
PROMPTS = ["a dog", "two cats", "Anna reads."]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    """A folder with a model and a checklist, and its torch network."""
    folder = tmp_path_factory.mktemp("checklist")
    network = vlm_folders.write_instruct(folder, request.param)
    (folder / CHECKLIST).write_text(json.dumps(QUESTIONS))
    return folder, network


def photos():
    """Photos of three rows: two, one and three people."""
    rng = np.random.default_rng(0)
    sizes = [((60, 90), (140, 100)), ((200, 120),), ((70, 70), (64, 130), (56, 84))]
    return [
        tuple(
            Photo(Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert("RGB"))
            for size in row
        )
        for row in sizes
    ]


def videos():
    return np.random.default_rng(1).uniform(-1, 1, (3, 5, 32, 48, 3)).astype(np.float32)


def loaded(folder, **changes):
    return load_checklist(RewardConfig(vlm=str(folder), vlm_dtype="float32", **changes))


def encoded(reward, rows):
    shown = References(tuple(photos()[row] for row in rows), 3)
    return reward.encode_references(shown, [PROMPTS[row] for row in rows], (5, 32, 48))


def original_log_odds(network, reward, asked, row, number, video):
    """Log-odds of yes of one question, from all logits of transformers on the same tokens and patches."""
    length = int(asked.tokens[row, number].sum())
    ids = torch.from_numpy(np.asarray(asked.ids[row, number, :length], np.int64))[None]
    settings, vision = reward.settings, reward.vision
    chosen = inputs.frame_indices(5, settings.frames)
    frames = inputs.frames_of(jnp.asarray(video)[None], chosen, vision, settings.pixels)
    shapes = [
        [1, *(places[mask].max(0) + 1)]
        for places, mask in zip(asked.place[row], asked.mask[row])
        if mask.any()
    ]
    height, width = np.asarray(frames.place[0][frames.mask[0]]).max(0) + 1
    config = network.config
    with torch.no_grad():
        logits = network(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == config.image_token_id).int()
            + 2 * (ids == config.video_token_id).int(),
            pixel_values=torch.from_numpy(asked.patches[row][asked.mask[row]]),
            pixel_values_videos=torch.from_numpy(np.array(frames.patches[frames.mask])),
            image_grid_thw=torch.tensor(np.asarray(shapes)),
            video_grid_thw=torch.tensor([[len(frames.mask), int(height), int(width)]]),
            second_per_grid_ts=torch.tensor([inputs.seconds_per_grid(5, 10.0, len(chosen))]),
        ).logits[0, -1]
    words = reward.promptings[0].tokenizer
    yes, no = (
        logits[words.convert_tokens_to_ids(list(names))].logsumexp(0)
        for names in (("Yes", "yes"), ("No", " no"))
    )
    return float(yes - no)


def test_answers_are_those_of_transformers_logits(model):
    folder, network = model
    reward = loaded(folder)
    asked = encoded(reward, [0, 1, 2])
    got = np.asarray(reward.log_odds(videos(), asked))
    want = [
        [original_log_odds(network, reward, asked, row, number, videos()[row]) for number in (0, 2)]
        for row in (0, 2)
    ]
    np.testing.assert_allclose(got[np.ix_([0, 2], [0, 2])], want, atol=1e-4)
    assert np.ptp(got, axis=0).min() > 1e-3
    assert np.ptp(got, axis=1).min() > 1e-3

    terms = jax.device_get(reward.score(videos(), asked))
    assert set(terms) == set(reward.term_names)
    answer = 2 / (1 + np.exp(-got)) - 1
    weight = np.stack([np.ones(3), 2.0 * (got[:, 0] > 0), np.full(3, 0.5)], axis=1)
    expected = (weight * answer).sum(1) / weight.sum(1)
    np.testing.assert_allclose(terms["reward"], expected, atol=1e-5)
    np.testing.assert_allclose(terms["hair"], answer[:, 1] * (got[:, 0] > 0), atol=1e-5)
    assert terms["faces_asked"].tolist() == [2, 1, 3]

    order = [2, 0, 1]
    permuted = np.asarray(reward.log_odds(videos()[order], encoded(reward, order)))
    np.testing.assert_allclose(permuted, got[order], atol=2e-5)
    alone = np.asarray(reward.log_odds(videos()[1:2], encoded(reward, [1])))
    np.testing.assert_allclose(alone[0], got[1], atol=2e-5)


def test_the_model_may_be_in_another_folder(tmp_path):
    (tmp_path / CHECKLIST).write_text(json.dumps(QUESTIONS))
    with pytest.raises(UserError, match="reward.vlm_base"):
        loaded(tmp_path)
    vlm_folders.write_instruct(tmp_path / "base", True)
    reward = loaded(tmp_path, vlm_base=str(tmp_path / "base"))
    assert reward.reported == ("face", "hair", "text")
    with pytest.raises(UserError, match="questions of the checklist .* are the prompt"):
        loaded(tmp_path, vlm_base=str(tmp_path / "base"), vlm_prompt="other.txt")


def test_a_tokenizer_without_yes_is_refused(tmp_path):
    vlm_folders.write_base(tmp_path)
    (tmp_path / CHECKLIST).write_text(json.dumps(QUESTIONS))
    with pytest.raises(UserError, match="no token for 'Yes'"):
        loaded(tmp_path)


def test_an_untied_model_without_output_layer_is_refused(tmp_path):
    vlm_folders.write_instruct(tmp_path, True)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": False}))
    (tmp_path / CHECKLIST).write_text(json.dumps(QUESTIONS))
    with pytest.raises(UserError, match="no tensor lm_head.weight"):
        loaded(tmp_path)


def test_scores_annotation_and_fit_by_command(tmp_path):
    """One checklist scores videos, labels them, and gets its weights from the labels."""
    vlm_folders.write_instruct(tmp_path / "model", True)
    (tmp_path / "model" / CHECKLIST).write_text(json.dumps(QUESTIONS))
    vlm_pairs.write_pairs(tmp_path / "films", 6, 0)
    reward = c.RewardConfig(vlm=str(tmp_path / "model"), vlm_dtype="float32", faces="")
    rows = [
        {"ref_paths": f"films/{number}.png", "prompt": "a person", "id": str(number)}
        for number in range(6)
    ]
    prompts = vlm_pairs.write_rows(tmp_path / "prompts.csv", rows)
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(6):
        for member, side in enumerate("AB"):
            (tmp_path / "films" / f"{number}{side}.mp4").rename(videos / f"{number}-{member}.mp4")
    config = c.Config(reward=reward, video=c.VideoConfig(frames=5, height=64, width=64, fps=10))
    annotate(config, [videos], prompts, tmp_path / "pairs.csv", ("SA", "face"))
    with (tmp_path / "pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert {"A", "B"} & {pair["SA"] for pair in pairs}, "answers in [-1, 1] are not all ties"
    for pair in pairs:
        assert abs(float(pair["difference_SA"])) < 2

    options = {"pairs": str(tmp_path / "pairs.csv"), "held_out": str(tmp_path / "pairs.csv")}
    fit = dataclasses.replace(
        config, finetune=c.FinetuneConfig(task="reward_linear", options=options)
    )
    train(fit, tmp_path / "run")
    fitted = read_checklist(tmp_path / "run" / "export" / CHECKLIST)
    assert [asked.question for asked in fitted] == [row["question"] for row in QUESTIONS]
    assert [asked.weight for asked in fitted] != [1.0, 2.0, 0.5]
    assert json.loads((tmp_path / "run" / "accuracy.json").read_text())["SA"]["without_ties"]
    loaded(tmp_path / "run" / "export", vlm_base=str(tmp_path / "model"))
