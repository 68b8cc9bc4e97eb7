"""A reward in another process: what is sent, what is repeated, and that a failure costs its own videos alone, in one line."""

import base64
import io
import json
import socket
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import remote
from jax_idgrpo.rewards.base import Photo, References, RemoteReward, check_references
from jax_idgrpo.rewards.host import collect
from jax_idgrpo.rewards.remote import HttpReward
from jax_idgrpo.training.checkpoint import check_resume
from tests.helpers.reward_server import Stub, level_of, pixels_of

SIZE = (4, 6, 8)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    return pauses


def videos(*levels):
    """Videos of one grey level each."""
    return np.broadcast_to(np.float32(levels)[:, None, None, None, None], (len(levels), *SIZE, 3))


def scores(stub, given, timeout=20.0, retries=2):
    """What a server gives, on the host."""
    reward = HttpReward(stub.address, SIZE, timeout, retries)
    references = References(
        tuple((Photo(Image.new("RGB", (20 + n, 16))),) for n in range(len(given))), 1
    )
    encoded = reward.encode_references(references, [f"prompt {n}" for n in range(len(given))])
    return collect(reward.score(given, encoded))


def echo(request, number):
    return json.dumps([level_of(request)])


def test_videos_texts_and_photos_are_sent_and_scores_come_back():
    with Stub(echo) as stub:
        found = scores(stub, videos(0.5, 0.1, -1))
        assert isinstance(HttpReward(stub.address, SIZE), RemoteReward)
    np.testing.assert_array_equal(found["reward"], np.float32([0.5, 0.1, -1]))
    sent = sorted(stub.requests, key=lambda request: request["prompts"])
    assert [request["prompts"] for request in sent] == [[f"prompt {n}"] for n in range(3)]
    for n, request in enumerate(sent):
        ((photo,),) = request["references"]
        with Image.open(io.BytesIO(base64.b64decode(photo))) as image:
            assert image.size == (20 + n, 16)


def test_a_photo_is_sent_as_its_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"these very bytes")
    with Stub(echo) as stub:
        reward = HttpReward(stub.address, SIZE)
        encoded = reward.encode_references(References(((Photo(tmp_path / "a.jpg"),),), 1), ["a"])
        collect(reward.score(videos(0), encoded))
    ((photo,),) = stub.requests[0]["references"]
    assert base64.b64decode(photo) == b"these very bytes"


def test_terms_are_reported():
    with Stub(lambda *_: '{"reward": [1], "sharpness": [3], "blur": [null]}') as stub:
        found = scores(stub, videos(0, 1))
    assert found["sharpness"].tolist() == [3, 3]
    assert np.isnan(found["blur"]).all()


def test_only_the_frames_that_a_server_asks_for_are_sent():
    given = np.arange(4, dtype=np.float32)[None, :, None, None, None] * np.ones((1, *SIZE, 3))
    seen = []

    def answer(request, number):
        assert pixels_of(request).dtype == np.float32
        seen.append(pixels_of(request)[:, 0, 0, 0].tolist())
        return "[0]"

    for frames in (b'{"frames": [0, 3]}', b'{"frames": null}', b"<html>", (404, {}, b"no")):
        with Stub(answer, frames) as stub:
            scores(stub, given.astype(np.float32))
    assert seen == [[0, 3]] + [[0, 1, 2, 3]] * 3


def broken(connection):
    """End the connection without a reply."""


def bad_for(levels, reply):
    """Answers `reply` for videos of these levels, and the level for the others."""
    return lambda request, number: reply if level_of(request) in levels else echo(request, number)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("<html>\n<h1>It works!</h1>", "the reply is no JSON but 25 bytes: <html> <h1>It works!"),
        ("[0.5, 0.5]", "reward of the reply has 2 numbers for 1 videos"),
        ('["high"]', "reward of the reply is no list of numbers"),
        ("[NaN]", "the server gives no number as the reward"),
        ("[null]", "the server gives no number as the reward"),
        ("[1e999]", "the server gives no number as the reward"),
        ('{"reward": [0.5', "the reply is no JSON but 15 bytes"),
        ('{"score": [0.5]}', 'the reply has no "reward" but score'),
        ("[" + " " * 2**20 + "1]", "the reply has more than 1048576 bytes"),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "status 302: redirects elsewhere"),
        ((400, {}, '{"error": "no face\\nis found"}'), "status 400: no face is found"),
        ((404, {}, "<html>" + "x" * 9999), "status 404: <html>xxx"),
        ((500, {}, "oops"), "status 500: oops after 3 attempts"),
        ((200, {"Content-Length": "100"}, "[1"), r"the connection failed \(.*\) after 3 attempts"),
        (broken, r"the connection failed \(.*\) after 3 attempts"),
    ],
)
def test_nonsense_costs_its_own_videos_and_is_one_line(reply, reason):
    with (
        Stub(bad_for([0.5, -0.5], reply)) as stub,
        pytest.warns(
            UserWarning,
            match=rf"^reward.backend: videos 1, 3 could not be scored \(NoScore: {reason}[^\n]*$",
        ) as told,
    ):
        found = scores(stub, videos(0, 0.5, 1, -0.5))
    assert len(told) == 1
    np.testing.assert_array_equal(found["reward"], np.float32([0, np.nan, 1, np.nan]))


def test_what_may_pass_is_repeated_with_growing_pauses(no_pauses):
    replies = [(503, {}, "busy"), broken, (429, {}, "slowly"), "[7]"]
    with Stub(lambda request, number: replies[number]) as stub, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(stub, videos(0), retries=3)["reward"].tolist() == [7]
    assert len(stub.requests) == 4
    assert no_pauses == [0.5, 1, 2]


def test_what_cannot_pass_is_not_repeated():
    with Stub(lambda *_: (400, {}, "no")) as stub, pytest.warns(UserWarning, match="status 400"):
        scores(stub, videos(0))
    assert len(stub.requests) == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1"])
def test_a_server_that_hangs_is_given_up_in_time(begun):
    gate = threading.Event()

    def hang(connection):
        connection.write(begun)
        connection.flush()
        gate.wait(60)

    reason = r"video 0 could not be scored \(NoScore: no answer in 0.5 seconds after 2 attempts"
    with Stub(bad_for([0.5], hang)) as stub:
        with pytest.warns(UserWarning, match=reason):
            found = scores(stub, videos(0.5, 0.25), timeout=0.5, retries=1)
        gate.set()
    np.testing.assert_array_equal(found["reward"], np.float32([np.nan, 0.25]))


def test_a_server_that_is_gone_costs_its_videos_and_the_run_goes_on():
    with Stub(echo) as stub:
        reward = HttpReward(stub.address, SIZE, 20.0, 1)
        encoded = reward.encode_references(References(((), ()), 1), ["a", "b"])
        np.testing.assert_array_equal(
            collect(reward.score(videos(0, 1), encoded))["reward"], [0, 1]
        )
    with pytest.warns(
        UserWarning,
        match=r"videos 0, 1 could not be scored \(NoScore: the connection failed "
        r"\(\[Errno 111\] Connection refused\) after 2 attempts\)",
    ) as told:
        assert np.isnan(collect(reward.score(videos(0, 1), encoded))["reward"]).all()
    assert len(told) == 1


# ---- at the start --------------------------------------------------------------------------------


def test_an_unreachable_server_is_one_line_at_the_start():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/score"
        with pytest.raises(
            UserError,
            match=rf"^reward.backend {address}: the connection failed \(.*refused\) after 2 attempts; "
            "start the server, or correct the address$",
        ):
            HttpReward(address, SIZE, 5.0, 1)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((415, {}, "only pickles"), "status 415: only pickles; see docs/reward.md"),
        ("<html>", "the reply is no JSON"),
        ("[1, 2]", "reward of the reply has 2 numbers for 1 videos"),
        (broken, "the connection failed"),
    ],
)
def test_a_refused_format_is_one_line_at_the_start(reply, reason, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "grey").save(tmp_path / name)
    (tmp_path / "my.csv").write_text("ref_paths,prompt\na.png,A dog runs.\nb.png,A cat.\n")
    prompts = load_prompts(tmp_path / "my.csv", 1)
    with Stub(lambda *_: reply) as stub:
        with pytest.raises(UserError, match=f"^reward.backend {stub.address}: {reason}") as caught:
            check_references(HttpReward(stub.address, SIZE, 20.0, 0), prompts)
        assert "\n" not in str(caught.value)
    with Stub(lambda *_: "[null]") as stub:  # a blank video need not have a reward
        check_references(HttpReward(stub.address, SIZE), prompts)
    (request,) = stub.requests
    assert request["prompts"] == ["A dog runs."]
    assert level_of(request) == 0
    assert base64.b64decode(request["references"][0][0]) == (tmp_path / "a.png").read_bytes()


def test_the_address_is_checked_and_may_change_on_resume():
    for address in ("http://127.0.0.1:8000/score", "https://rewards.example", "http://[::1]:80/x"):
        assert c.RewardConfig(backend=address).served
    for address in (
        "http://",
        "http://user:word@host/",
        "http://host/?key=1",
        "ftp://host/",
        "http",
    ):
        with pytest.raises(UserError, match="deepface:opencv/ArcFace, or http://HOST:PORT/PATH"):
            c.RewardConfig(backend=address)
    with pytest.raises(UserError, match="reward.mixture"):
        c.RewardConfig(backend="http://host/", mixture={"motion": 1.0})

    def config(backend, **others):
        return c.Config(reward=c.RewardConfig(backend=backend, **others))

    old = config("http://a:1/score").to_json()
    check_resume(old, config("http://b:2/score", http_timeout=5.0, http_retries=0))
    with pytest.raises(
        UserError, match="cannot resume exactly: reward.backend was 'http://a:1/score'"
    ):
        check_resume(old, c.Config())
