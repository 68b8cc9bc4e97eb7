"""The format of a reward server: what is sent arrives unchanged, and what is not in the format is one line."""

import base64
import gzip
import io
import json

import numpy as np
import pytest

from jax_idgrpo.data.video import write_video
from jax_idgrpo.rewards import exchange
from jax_idgrpo.rewards.exchange import Refused


def noise(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def body(video, **others):
    values = {"videos": [base64.b64encode(video).decode()], "prompts": ["a"]} | others
    return json.dumps(values).encode()


def test_a_request_arrives_bit_for_bit():
    videos, photos = [noise(3, 4, 6, 3), noise(2, 5, 4, 3)], [[b"one", b"two"], []]
    found = exchange.decode_request(exchange.encode_request(videos, ["Ann", "Bé"], photos))
    assert (found.prompts, found.references) == (["Ann", "Bé"], photos)
    for sent, got in zip(videos, found.videos, strict=True):
        assert got.dtype == np.float32
        assert sent.tobytes() == got.tobytes()


def test_videos_are_compressed_where_that_saves_space():
    flat = np.full((4, 64, 64, 3), 0.5, np.float32)
    coarse = noise(4, 64, 64, 3).astype(np.float16).astype(np.float32)
    sizes = [
        len(exchange.encode_request([v], [""], [[]])) for v in (flat, coarse, noise(4, 64, 64, 3))
    ]
    whole = flat.nbytes * 4 / 3  # in base64
    assert sizes[0] < 0.05 * whole
    assert sizes[1] < 0.8 * whole
    assert sizes[2] < 1.01 * whole
    for video in (flat, coarse):
        (found,) = exchange.decode_request(exchange.encode_request([video], [""], [[]])).videos
        np.testing.assert_array_equal(found, video)


def test_every_kind_of_video_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    wanted = pixels.astype(np.float32) / 127.5 - 1
    np.save(tmp_path / "old.npy", np.asfortranarray(wanted.astype(">f4")))
    for sent, error in (
        (npy(pixels), 0),
        (npy(wanted), 0),
        ((tmp_path / "old.npy").read_bytes(), 0),
        (gzip.compress(npy(pixels)), 0),
        (npy(wanted.astype(np.float16)), 1e-3),
    ):
        (found,) = exchange.decode_request(body(sent)).videos
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=error)
    write_video(tmp_path / "a.mp4", np.full((4, 32, 32, 3), 200, np.uint8), 8)
    (found,) = exchange.decode_request(body((tmp_path / "a.mp4").read_bytes())).videos
    assert found.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(found, 200 / 127.5 - 1, atol=0.05)


def header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117)
    return b"\x93NUMPY\x01\x00v\x00" + text + b"\n"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"<html>502</html>", "no JSON but 16 bytes: <html>502</html>"),
        (b'{"videos": [', "no JSON but 12 bytes"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"videos": 3, "prompts": []}', "videos is no list"),
        (body(npy(np.zeros((1, 2, 2, 3), np.uint8)), prompts=["a", "b"]), "1 videos, 2 prompts"),
        (body(b"x", prompts=[7]), "prompt 0 is no text"),
        (body(b"x", references=[["!"]]), "photo 0 of video 0: no base64 text"),
        (body(b"x", references=[7]), "references 0: no list"),
        (body(b"x", videos=["!"]), "video 0: no base64 text"),
        (body(b"x", videos=[None]), "video 0: no base64 text"),
        (body(b"hello"), "video 0 of the request: is no video of a kind"),
        (body(npy(np.zeros((2, 2, 3)))), "has dtype float64"),
        (body(npy(np.zeros((2, 2, 3), np.uint8))), r"has shape \[2, 2, 3\]"),
        (body(npy(np.zeros((0, 2, 2, 3), np.uint8))), "has 0 frames"),
        (body(npy(np.zeros((1, 4097, 1, 3), np.uint8))), "a side may have 4096"),
        (body(npy(np.full((1, 2, 2, 3), np.nan, np.float32))), "is not finite"),
        (body(npy(np.full((1, 2, 2, 3), 200, np.float32))), "values 200 to 200; send floats in"),
        (body(npy(np.zeros((1, 2, 2, 3), object), allow_pickle=True)), "has dtype object"),
        (body(npy(np.zeros((1, 2, 2, 3), np.uint8))[:-1]), "another size than its header"),
        (body(header("(1, 4000, 4000, 3)")), "another size than its header"),
        (body(header("(1, __import__('os').getpid(), 4, 3)")), "no npy file"),
        (body(gzip.compress(npy(np.zeros((1, 2, 2, 3), np.uint8)))[:-9]), "is cut off"),
        (body(b"\x1f\x8bxxxxxxxxxxxx"), "no intact gzip"),
    ],
)
def test_what_is_not_in_the_format_is_one_line(sent, reason):
    with pytest.raises(Refused, match=reason) as caught:
        exchange.decode_request(sent)
    assert "\n" not in str(caught.value)


def test_what_unpacks_to_more_than_a_video_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(exchange, "MAX_PIXELS", 1000)
    with pytest.raises(Refused, match="is too large"):
        exchange.decode_pixels(gzip.compress(bytes(10**6)), "0")


def test_videos_that_are_too_large_together_are_refused(monkeypatch):
    monkeypatch.setattr(exchange, "MAX_PIXELS", 100)
    sent = exchange.encode_request([noise(1, 6, 6, 3)] * 3, ["a"] * 3, [[]] * 3)
    with pytest.raises(Refused, match="has over 100 pixels; send fewer videos at once"):
        exchange.decode_request(sent)


def test_a_video_file_with_too_many_pixels_is_not_decoded_to_its_end(monkeypatch, tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    monkeypatch.setattr(exchange, "MAX_PIXELS", 8 * 32 * 32)
    with pytest.raises(Refused, match="has over 8192 pixels in all frames"):
        exchange.decode_pixels((tmp_path / "a.mp4").read_bytes(), "0")


def test_a_reply_arrives_as_the_same_float32():
    terms = {"reward": np.float32([0.1, np.nan, -3e-7]), "motion": np.float32([1, 2, np.inf])}
    sent = exchange.encode_reply({name: value.tolist() for name, value in terms.items()})
    json.loads(sent, parse_constant=pytest.fail)  # strict JSON has no NaN
    found = exchange.decode_reply(sent, 3)
    np.testing.assert_array_equal(np.float32(found["reward"]), terms["reward"])
    np.testing.assert_array_equal(np.float32(found["motion"]), np.float32([1, 2, np.nan]))
    assert exchange.decode_reply(b"[1, 2.5, null]", 3)["reward"][:2] == [1, 2.5]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"<html>\n<body>busy", "is no JSON but 17 bytes: <html> <body>busy"),
        (b"", "is no JSON but 0 bytes"),
        (b'{"reward": [0.5', "is no JSON"),
        (b'{"rewards": [1]}', 'no "reward" but rewards'),
        (b'"good"', 'no "reward" but str'),
        (b"0.5", 'no "reward" but float'),
        (b"[1, 2]", "2 numbers for 1 videos"),
        (b"[]", "0 numbers for 1 videos"),
        (b'{"reward": [1], "x": []}', "x of the reply has 0 numbers"),
        (b'["1"]', "no list of numbers"),
        (b"[true]", "no list of numbers"),
        (b"[[1]]", "no list of numbers"),
        (b'{"reward": 1}', "no list of numbers"),
        (b"[1" + b"0" * 400 + b"]", "no list of numbers"),
        (b'{"reward": [1], "step": [7]}', "is called 'step'"),
        (b'{"reward": [1], "a\\nb": [7]}', "is called 'a b'"),
        (json.dumps({"reward": [1]} | {f"t{n}": [1] for n in range(200)}).encode(), "201 terms"),
    ],
)
def test_a_reply_that_is_no_reward_is_one_line(sent, reason):
    with pytest.raises(Refused, match=reason) as caught:
        exchange.decode_reply(sent, 1)
    assert "\n" not in str(caught.value)


def test_only_usable_numbers_of_frames_are_taken():
    chosen = exchange.decode_frames(exchange.encode_frames(np.array([0, 4, 8])), 9)
    assert chosen.tolist() == [0, 4, 8]
    assert exchange.decode_frames(exchange.encode_frames(None), 9) is None
    for sent in (b"<html>", b'{"frames": [0, 9]}', b'{"frames": [4, 0]}', b'{"frames": []}', b"[]"):
        assert exchange.decode_frames(sent, 9) is None
