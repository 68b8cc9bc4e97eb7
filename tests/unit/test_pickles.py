"""Pickled requests of other trainers are understood, and nothing in them is executed."""

import os
import pickle

import numpy as np
import pytest

from jax_idgrpo.rewards import pickles
from jax_idgrpo.rewards.exchange import Refused


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_requests_of_both_clients_are_read(protocol):
    images = [b"\xff\xd8" + bytes(300), b"\xff\xd8"]
    theirs = {"images": images, "prompts": ["a", "Bé waves 😀"], "metadata": {}}
    assert pickles.read(pickle.dumps(theirs, protocol)) == theirs
    for prompts in (
        np.array_split(["a", "Bé waves 😀", "cut"], 2)[0],  # as flow_grpo's, an array of texts
        np.array(["a", "Bé waves 😀"], object),
        ("a", "Bé waves 😀"),
    ):
        found = pickles.read(pickle.dumps({"images": images, "prompts": prompts}, protocol))
        assert found["images"] == images
        assert pickles.texts(found["prompts"]) == ["a", "Bé waves 😀"]


class Program:
    """What a pickle may hold: a call of any function of any module."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["all", "images", "prompts", "element", "array"])
def test_nothing_is_executed(place, protocol, tmp_path):
    program = Program(str(tmp_path / "made"))
    sent = {
        "all": program,
        "images": {"images": program, "prompts": ["a"]},
        "prompts": {"images": [b""], "prompts": program},
        "element": {"images": [b""], "prompts": ["a", program]},
        "array": {"images": [b""], "prompts": np.array(["a", program], object)},
    }[place]
    refused = []
    try:
        found = pickles.read(pickle.dumps(sent, protocol))
        pickles.texts(found["prompts"])
    except Refused as error:
        refused.append(error)
    assert refused or place == "images"  # whose use checks that they are bytes
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"<html>",
        b"{}",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04]\x94.",
        pickle.dumps({1: 2}),
        pickle.dumps({"images": [b"x" * 100]})[:-20],
        b"\x80\x04\x8c\x01x\x8c\x01yb.",
        b"\x80\x04}(]]u.",
        b"\x80\x04}h\x07s.",
        b"\x80\x04ccodecs\nencode\n.",
        b"\x80\x04P1\n.",
    ],
)
def test_what_is_no_request_is_one_line(sent):
    with pytest.raises(Refused) as caught:
        pickles.read(sent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(260))
def test_any_damage_is_refused_or_harmless(cut):
    whole = pickle.dumps({"images": [b"abc"], "prompts": np.array(["abc", "d"])})
    for value in range(0, 256, 17):
        damaged = whole[:cut] + bytes([value]) + whole[cut + 1 :]
        try:
            found = pickles.read(damaged)
            assert all(type(text) is str for text in pickles.texts(found.get("prompts")))
        except Refused:
            pass
