"""Greedy decoding with pictures, token by token as transformers' generate, with tied and untied output layers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from jax_idgrpo.rewards.base import Photo
from jax_idgrpo.rewards.vlm.describer import load_describer
from tests.helpers import vlm_folders

STEPS = 24
SIZES = ((60, 90), (200, 120), (140, 100))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    """A folder and its torch network; weights of the head large enough that texts vary."""
    folder = tmp_path_factory.mktemp("describer")
    return folder, vlm_folders.write_instruct(folder, request.param)


def photos():
    rng = np.random.default_rng(0)
    return [Photo(Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))) for size in SIZES]


def generate(network, asked, row, **options):
    """The tokens that transformers writes for one row, from the same tokens and patches."""
    ids = torch.from_numpy(asked.ids[row][asked.tokens[row]].astype(np.int64))[None]
    height, width = asked.place[row, 0][asked.mask[row, 0]].max(0) + 1
    with torch.no_grad():
        text = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == network.config.image_token_id).int(),
            pixel_values=torch.from_numpy(asked.patches[row, 0][asked.mask[row, 0]]),
            image_grid_thw=torch.tensor([[1, int(height), int(width)]]),
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=0,
            **options,
        )
    return text[0, ids.shape[1] :].tolist()


def loaded(folder, **generation):
    """Our describer, with the end tokens and the penalty of a generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(generation))
    describer = load_describer(folder, "float32", STEPS)
    return describer, describer.ask([describer.picture(photo) for photo in photos()])


def test_texts_equal_those_of_transformers_in_a_batch_of_pictures_of_other_sizes(model):
    folder, network = model
    describer, asked = loaded(folder, eos_token_id=271)
    want = [generate(network, asked, row, eos_token_id=271) for row in range(3)]
    assert describer.tokens(asked) == want
    assert len({tuple(text) for text in want}) == 3  # the pictures decide
    assert max(len(set(text)) for text in want) > 3


def test_texts_end_and_avoid_repetition_as_in_transformers(model):
    folder, network = model
    _, asked = loaded(folder, eos_token_id=271)
    end = generate(network, asked, 1, eos_token_id=271, repetition_penalty=1.3)[5]
    options = dict(eos_token_id=[271, end], repetition_penalty=1.3)
    describer, asked = loaded(folder, **options)
    found = describer.tokens(asked)
    assert found == [generate(network, asked, row, **options) for row in range(3)]
    assert found[1][-1] == end
    assert len(found[1]) <= 6
    assert max(map(len, found)) > len(found[1])
