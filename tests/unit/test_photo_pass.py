"""The pass over the photos before a run: damaged ones are found whatever the reward, and few are in memory."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import base
from jax_idgrpo.rewards.base import check_references
from jax_idgrpo.rewards.custom import CustomReward
from jax_idgrpo.rewards.remote import HttpReward
from tests.helpers.decodes import count_decodes
from tests.helpers.reward_server import Stub


def write_prompts(folder, count, damaged=()):
    """Load the prompts of a CSV with one photo per row; some photos are damaged within."""
    lines = ["ref_paths,prompt"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        if number in damaged:
            content = bytearray(path.read_bytes())
            content[3000:3050] = bytes(50)
            path.write_bytes(content)
        lines.append(f"{number}.png,A person waves.")
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    return load_prompts(folder / "my.csv", 1, decode=False)


def custom():
    return CustomReward(lambda videos, prompts, references: [0.0] * len(videos))


@pytest.mark.parametrize("kind", ["custom", "served"])
def test_every_damaged_photo_is_named_whatever_the_reward_reads(tmp_path, kind):
    prompts = write_prompts(tmp_path, 6, damaged=(2, 4))
    with Stub(lambda *_: "[0.5]") as stub:
        reward = custom() if kind == "custom" else HttpReward(stub.address, (2, 16, 16))
        with pytest.raises(UserError) as caught:
            check_references(reward, prompts)
        lines = [
            f"prompts {tmp_path}/my.csv, line {n}: image {tmp_path}/{n - 2}.png" for n in (4, 6)
        ]
        assert str(caught.value).startswith(
            f"2 of 6 reference photos cannot be used: {lines[0]}: cannot be read"
        )
        assert f"{lines[1]}: cannot be read" in str(caught.value)
        assert str(caught.value).endswith("; store it again as PNG or JPEG")
        check_references(reward, [prompts[n] for n in (0, 1, 3, 5)])


def test_odd_photos_are_noted_with_their_line(tmp_path):
    prompts = write_prompts(tmp_path, 2)
    Image.new("RGB", (64, 48), "black").save(tmp_path / "1.png")
    with pytest.warns(UserWarning, match=r"my.csv, line 3: image .*1.png: is nearly black"):
        check_references(custom(), prompts)


def test_a_photo_is_decoded_once_for_all_and_few_are_in_memory(tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path, 30)
    again = [dataclasses.replace(prompt, id=100 + prompt.id) for prompt in prompts]
    decoded, pictures, most = count_decodes(monkeypatch), [], []
    decode = base.decode_photo

    def watched(file):
        found = decode(file)
        pictures.append(weakref.ref(found.image))
        return found

    monkeypatch.setattr(base, "decode_photo", watched)
    seen = {}

    def alive():
        gc.collect()
        return sum(picture() is not None for picture in pictures)

    def consume(file, image):
        seen[file] = image.getpixel((0, 0))
        most.append(alive())

    reward = custom()
    check_references(reward, prompts + again, [custom()], consume)
    assert decoded == {prompt.digests[0]: 1 for prompt in prompts}
    assert list(seen) == [prompt.references[0] for prompt in prompts], "once each, in order"
    assert len(set(seen.values())) > 25
    assert max(most) <= base.AHEAD + 2
    assert not alive(), "the reward keeps no pixels"
