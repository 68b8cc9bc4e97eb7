"""`idgrpo serve-reward`: scores as in the training process, runs that survive its death, and what it refuses."""

import base64
import contextlib
import http.client
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import data

from jax_idgrpo import cli
from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import exchange, factory, serve
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.host import collect
from jax_idgrpo.rewards.remote import HttpReward
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.training import train
from tests.helpers.paths import ROOT
from tests.helpers.reward_server import Stub, served
from tests.helpers.tiny_run import rows
from tests.helpers.vlm_runs import configured, make_folder

RUN = [
    ("run.sample_every", "0"),
    ("rollout.prompts", "2"),
    ("rollout.group", "2"),
    ("rollout.steps", "4"),
    ("rollout.window_size", "2"),
    ("reward.http_retries", "1"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A CSV of prompts with photos, its prompts, and a video of the people of each."""
    folder = tmp_path_factory.mktemp("prompts")
    batch = scenes.batch(99, 0, 4, "eval", frames=9)
    lines = ["ref_paths,prompt"]
    for n, (portraits, mask) in enumerate(zip(np.asarray(batch.portraits), np.asarray(batch.mask))):
        names = [f"{n}-{m}.png" for m in range(mask.sum())]
        for name, portrait in zip(names, portraits):
            Image.fromarray(to_uint8(portrait)).save(folder / name)
        lines.append(f"{';'.join(names)},prompt {n}")
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    prompts = load_prompts(folder / "my.csv", batch.mask.shape[1])
    return folder / "my.csv", prompts, np.asarray(batch.video)


@pytest.fixture(scope="module")
def server(drawn):
    """The bundled face reward; prompts without photos are those of the CSV."""
    with served("--prompts", str(drawn[0])) as (_, address):
        yield address


def post(address, path, body):
    """Status and body of a reply."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.request("POST", path, body)
    with connection.getresponse() as reply:
        return reply.status, reply.read()


def score(reward, prompts, videos):
    people = c.load("quickstart", []).data.max_people
    encoded = reward.encode_references(
        References.of_prompts(prompts, people), [prompt.text for prompt in prompts]
    )
    return collect(reward.score(jnp.asarray(videos), jax.tree.map(jnp.asarray, encoded)))


def own(prompts, videos):
    """The terms of the reward in this process."""
    return score(factory.make_reward(c.load("quickstart", [])), prompts, videos)


def test_a_server_gives_the_terms_of_the_reward_in_this_process(server, drawn):
    _, prompts, videos = drawn
    here = own(prompts, videos)
    there = score(
        factory.make_reward(c.load("quickstart", [("reward.backend", server)])), prompts, videos
    )
    assert here["similarity"].mean() > 0.3
    assert len(set(here["reward"].tolist())) == 4
    assert here.keys() == there.keys()
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, atol=1e-6, err_msg=name)


def test_three_steps_have_the_rewards_of_this_process(server, tmp_path, monkeypatch):
    config = c.load("quickstart", [*RUN, ("run.steps", "3"), ("reward.backend", server)])
    here, there = factory.make_reward(c.load("quickstart", [])), HttpReward.score
    compared = []

    def both(self, videos, encoded):
        found = there(self, videos, encoded)
        asked = [self._rows[number] for number in np.asarray(encoded)]
        known = here.encode_references(
            References(tuple(row.photos for row in asked), config.data.max_people),
            [row.text for row in asked],
        )
        wanted = collect(here.score(videos, jax.tree.map(jnp.asarray, known)))
        compared.append((collect(found), wanted))
        return found

    monkeypatch.setattr(HttpReward, "score", both)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "reward.backend")
        train.train(config, tmp_path)
    for found, wanted in compared:
        np.testing.assert_allclose(found["reward"], wanted["reward"], atol=1e-6)
    logged = rows(tmp_path)
    kept = ("ratio_min", "ratio_max", "skipped", "rewards_failed")
    assert [[row[name] for name in kept] for row in logged] == [[1, 1, 0, 0]] * 3
    assert all(row["reward_group_std"] > 0 for row in logged)


def test_a_server_that_dies_within_a_step_costs_its_videos_and_the_run_goes_on(
    tmp_path, monkeypatch
):
    posted, calls, others = HttpReward._terms, [], contextlib.ExitStack()
    monkeypatch.setattr("jax_idgrpo.rewards.remote.REQUESTS", 1)
    with served() as (process, address), others:
        config = c.load("quickstart", [*RUN, ("run.steps", "3"), ("reward.backend", address)])

        def dying(self, video, number):
            calls.append(number)
            if len(calls) == 7:  # after the check, the first step, and a video of the second
                process.send_signal(signal.SIGKILL)
                process.wait()
            if len(calls) == 10:  # at the third step, another server is there
                port = urlsplit(address).port
                others.enter_context(Stub(lambda request, number: f"[{number}]", port=port))
            return posted(self, video, number)

        monkeypatch.setattr(HttpReward, "_terms", dying)
        with pytest.warns(UserWarning, match="reward.backend: ") as told:
            train.train(config, tmp_path)
    (line,) = [text for one in told if "reward.backend: " in (text := str(one.message))]
    assert re.search(
        r"videos 1, 2, 3 could not be scored \(NoScore: the connection failed .* after 2 attempts\)",
        line,
    )
    logged = rows(tmp_path)
    kept = ("ratio_min", "ratio_max", "skipped", "rewards_failed")
    assert [[row[name] for name in kept] for row in logged] == [
        [1, 1, 0, 0],
        [1, 1, 0, 3],
        [1, 1, 0, 0],
    ]
    assert logged[2]["reward"] == 1.5
    assert (tmp_path / "export").is_dir()


def test_files_are_scored_as_videos_are(server, drawn, tmp_path):
    _, prompts, videos = drawn
    write_video(tmp_path / "a.mp4", videos[0], 8, FINE)
    photos = [base64.b64encode(path.read_bytes()).decode() for path in prompts[0].references]
    buffer = io.BytesIO()
    np.save(buffer, to_uint8(videos[0]))
    found = []
    for content in ((tmp_path / "a.mp4").read_bytes(), buffer.getvalue()):
        request = {
            "videos": [base64.b64encode(content).decode()],
            "prompts": [prompts[0].text],
            "references": [photos],
        }
        status, reply = post(server, "/score", json.dumps(request).encode())
        assert status == 200
        found.append(json.loads(reply)["similarity"][0])
    np.testing.assert_allclose(found, own(prompts[:1], videos[:1])["similarity"][0], atol=0.02)


def test_a_score_depends_on_no_other_video(server, drawn):
    _, prompts, videos = drawn
    texts = [prompt.text for prompt in prompts]
    photos = [[path.read_bytes() for path in prompt.references] for prompt in prompts]
    together = json.loads(
        post(server, "/score", exchange.encode_request(list(videos), texts, photos))[1]
    )
    for n in range(4):
        alone = exchange.encode_request([videos[n]], texts[n : n + 1], photos[n : n + 1])
        found = json.loads(post(server, "/score", alone)[1])
        assert {name: value[0] for name, value in found.items()} == {
            name: value[n] for name, value in together.items()
        }


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(picture)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_clients_of_other_trainers_get_their_scores(server, drawn):
    _, prompts, videos = drawn
    texts = [prompt.text for prompt in prompts]
    pictures = [jpeg(video[0]) for video in videos]
    decoded = [np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]
    wanted = own(prompts, np.float32(decoded)[:, None] / 127.5 - 1)["reward"]

    asked = {"images": pictures[:1], "prompts": texts[:1], "metadata": {}}  # one at a time
    status, reply = post(server, "/verl-omni", pickle.dumps(asked))
    assert status == 200
    np.testing.assert_allclose(pickle.loads(reply)["scores"], wanted[:1], atol=1e-6)

    asked = {"images": pictures, "prompts": np.array_split(texts, 1)[0]}
    status, reply = post(server, "/flow-grpo", pickle.dumps(asked))
    assert status == 200
    np.testing.assert_allclose(pickle.loads(reply)["outputs"], wanted, atol=1e-6)


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_cannot_be_scored_is_status_400_with_one_line(server, drawn, tmp_path):
    _, prompts, videos = drawn
    text, picture = prompts[0].text, jpeg(videos[0, 0])
    program = Program(str(tmp_path / "made"))
    blank = io.BytesIO()
    Image.new("RGB", (64, 64)).save(blank, "PNG")
    for path, asked, reason in (
        ("/verl-omni", {"images": [picture], "prompts": ["nobody asked"]}, "comes without photos"),
        ("/verl-omni", {"images": [b"GIF8"], "prompts": [text]}, "image 0 of the request: "),
        ("/verl-omni", {"images": [program], "prompts": [text]}, "no list of encoded images"),
        ("/flow-grpo", {"images": [picture]}, "has no prompts"),
        ("/flow-grpo", {"images": [picture], "prompts": [text, text]}, "1 images and 2 prompts"),
        ("/flow-grpo", program, "no pickled dict"),
    ):
        status, reply = post(server, path, pickle.dumps(asked))
        line = pickle.loads(reply)["error"]
        assert status == 400, line
        assert reason in line
        assert "\n" not in line
    assert not (tmp_path / "made").exists()
    for body, reason in (
        (pickle.dumps({"images": [picture]}), "no JSON"),
        (exchange.encode_request(list(videos[:1]), [text], [[b"x"]]), "image of the request"),
        (
            exchange.encode_request(list(videos[:1]), [text], [[blank.getvalue()]]),
            "no face is found",
        ),
        (exchange.encode_request(list(videos[:1]), [text], [[picture] * 9]), "has 9 photos"),
        (exchange.encode_request(list(videos[:1]), ["nobody asked"], [[]]), "comes without photos"),
    ):
        status, reply = post(server, "/score", body)
        line = json.loads(reply)["error"]
        assert status == 400, line
        assert reason in line
        assert "\n" not in line
    assert post(server, "/else", b"")[0] == 404
    assert post(server, "/score", b'{"videos": [], "prompts": []}') == (200, b'{"reward": []}')


def test_a_request_that_is_too_large_is_refused(server):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    connection.putrequest("POST", "/score")
    connection.putheader("Content-Length", str(2**30 + 1))
    connection.endheaders()
    with connection.getresponse() as reply:
        assert reply.status == 413
        assert b"more than 1073741824 bytes" in reply.read()


def test_a_reward_that_fails_costs_its_video_and_the_server_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(videos, prompts, references):\n"
        "    if prompts[0] == 'raise':\n        raise RuntimeError('no')\n"
        "    return {'reward': videos.mean((1, 2, 3, 4)), 'photos': [len(references[0])]}\n"
    )
    grey = np.full((2, 16, 16, 3), 0.25, np.float32)
    with served("--reward.custom", f"{tmp_path}/mine.py:score") as (process, address):
        for text, wanted in (("raise", [None]), ("a", [0.25])):
            status, reply = post(address, "/score", exchange.encode_request([grey], [text], [[]]))
            assert status == 200
            assert json.loads(reply)["reward"] == wanted
        assert json.loads(reply)["photos"] == [0]  # a function may do without photos
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def in_process(config, prompts, videos, tmp_path):
    """The terms by a service and by the reward itself."""
    service = serve.Service(config, tmp_path)
    photos = [[path.read_bytes() for path in prompt.references] for prompt in prompts]
    texts = [prompt.text for prompt in prompts]
    reply = service.answer(exchange.encode_request(list(videos), texts, photos))
    reward = factory.make_reward(config)
    encoded = reward.encode_references(
        References.of_prompts(prompts, config.data.max_people), texts, videos.shape[1:4]
    )
    wanted = collect(reward.score(jnp.asarray(videos), jax.tree.map(jnp.asarray, encoded)))
    return exchange.decode_reply(reply, len(videos)), wanted


@pytest.mark.filterwarnings("ignore:reward.vlm_prompt")
def test_a_vision_language_reward_is_served(drawn, tmp_path_factory, tmp_path):
    config = c.Config(
        reward=configured(make_folder(tmp_path_factory)), data=c.DataConfig(max_people=3)
    )
    found, wanted = in_process(config, drawn[1][:2], drawn[2][:2], tmp_path)
    assert len(set(found["reward"])) == 2
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_deepface_is_served(tmp_path):
    pytest.importorskip("deepface", reason="the extra `faces` is not installed")
    picture = data.astronaut()
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "my.csv").write_text("ref_paths,prompt\na.png,An astronaut smiles.\n")
    video = np.broadcast_to(np.float32(picture) / 127.5 - 1, (1, 2, *picture.shape))
    config = c.Config(reward=c.RewardConfig(backend="deepface:opencv/embedder"))
    prompts = load_prompts(tmp_path / "my.csv", 1)
    (tmp_path / "stored").mkdir()
    found, wanted = in_process(config, prompts, video, tmp_path / "stored")
    assert found["faces_found"] == [1]
    assert found == {name: value.tolist() for name, value in wanted.items()}


# ---- starting it ---------------------------------------------------------------------------------


def test_it_listens_on_this_machine_alone_unless_told(capsys):
    with serve.listen("127.0.0.1", 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"
        assert capsys.readouterr().err == ""
    with serve.listen("0.0.0.0", 0) as opened:
        port = opened.getsockname()[1]
    assert capsys.readouterr().err == (
        f"idgrpo: warning: http://0.0.0.0:{port} can be reached from other machines, and anyone "
        "there may use it\n"
    )
    with pytest.raises(UserError, match="--host 203.0.113.7 --port 0: cannot listen there"):
        serve.listen("203.0.113.7", 0)
    with pytest.raises(UserError, match="--port 70000: is no port"):
        serve.listen("127.0.0.1", 70000)


def test_the_address_of_a_server_is_of_this_machine(server):
    assert urlsplit(server).hostname == "127.0.0.1"


def test_a_port_in_use_is_one_line(server):
    port = str(urlsplit(server).port)
    command = [sys.executable, "-m", "jax_idgrpo", "serve-reward", "quickstart", "--port", port]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"idgrpo: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use); "
        "use another port, or end the program that has it\n"
    )


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette", type(sys)("starlette"))
    with pytest.raises(UserError, match=r"needs uvicorn, .*; pip install 'jax-idgrpo\[serve\]'"):
        serve.serve(c.load("quickstart", []), "127.0.0.1", 0)


def test_the_client_of_the_documentation_gets_a_score(server, drawn, tmp_path, monkeypatch, capsys):
    _, prompts, videos = drawn
    page = (ROOT / "docs" / "reward.md").read_text()
    (example,) = re.findall(r"```python\n(import base64.*?)```", page, re.DOTALL)
    write_video(tmp_path / "walk.mp4", videos[0], 8, FINE)
    for name, photo in zip(("ann.jpg", "ben.jpg"), prompts[0].references * 2):
        (tmp_path / name).write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(example.replace("http://127.0.0.1:8100/score", server), {})
    (reward,) = json.loads(capsys.readouterr().out)
    assert np.isfinite(reward)


def test_score_and_its_server_agree(server, drawn, tmp_path):
    csv, _, videos = drawn
    write_video(tmp_path / "0000-0.mp4", videos[0], 8, FINE)
    found = []
    for name, words in (("here", []), ("there", ["--reward.backend", server])):
        out = tmp_path / f"{name}.jsonl"
        files = ["--videos", str(tmp_path / "0000-0.mp4"), "--prompts", str(csv), "--out", str(out)]
        cli.run(["score", "quickstart", *files, *words])
        found.append(json.loads(out.read_text()))
    assert found[0]["judge_identity"] == found[1]["judge_identity"]
    assert found[1]["reward"] == pytest.approx(found[0]["reward"], abs=1e-6)
    assert found[1]["motion"] == pytest.approx(found[0]["motion"], abs=1e-6)
