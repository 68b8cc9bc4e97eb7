"""The labelling page over HTTP: only with its token, only the listed files, and every label stored."""

import json

import av
import pytest

from jax_idgrpo.preferences.label_items import load_items
from jax_idgrpo.preferences.label_server import HEADERS, Media, make_app
from jax_idgrpo.preferences.labels import LOG, Desk
from tests.helpers.label_pairs import write_label_pairs

testclient = pytest.importorskip("starlette.testclient")


@pytest.fixture
def client(tmp_path):
    path = write_label_pairs(tmp_path / "pairs", 12)
    items = load_items(path, ("SA",))
    desk = Desk(items, [], ("SA",), tmp_path, overlap=0.0)
    app = make_app(desk, Media(items, tmp_path), "secret", tmp_path / "pairs.csv")
    with testclient.TestClient(app) as client:
        client.folder, client.items = tmp_path, items
        yield client


def test_nothing_is_answered_without_the_token(client):
    for address in ("/", "/next?annotator=Ann", "/wrong/next?annotator=Ann", "/Secret/", "/secre/"):
        assert client.get(address).status_code == 404
    assert client.post("/label", json={}).status_code == 404
    assert client.get("/secret/").status_code == 200


def test_the_page_loads_only_its_own_files(client):
    for name in ("", "label_page.js", "label_page.css"):
        reply = client.get(f"/secret/{name}")
        assert reply.status_code == 200
        for header, value in HEADERS.items():
            assert reply.headers[header] == value
    page = client.get("/secret/").text
    assert "http" not in page.replace("data:", "")


def test_a_label_is_stored_and_the_next_question_follows(client):
    first = client.get("/secret/next?annotator=Ann").json()
    assert (first["done"], first["total"]) == (0, 12)
    unit = first["now"]["unit"]
    sent = {"annotator": "Ann", "unit": unit, "labels": {"SA": "A"}, "seconds": 1.5}
    following = client.post("/secret/label", json=sent).json()
    assert following["now"]["unit"] == first["after"]["unit"]
    assert following["done"] == 1
    (line,) = (client.folder / LOG).read_text().splitlines()
    assert json.loads(line) == sent | {"undone": False}
    undone = client.post("/secret/undo", json={"annotator": "Ann"}).json()
    assert undone["now"]["unit"] == unit
    assert undone["done"] == 0
    client.post("/secret/label", json=sent | {"labels": {"SA": "same"}})
    assert ",same,trusted,Ann=same" in client.get("/secret/pairs.csv").text
    assert client.get("/secret/summary").json()["labelled"] == 1


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"nonsense", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "labels maps"),
        (b'{"labels": {"SA": 1}}', "labels maps"),
        (b'{"labels": {}, "annotator": ""}', "enter a name"),
        (b'{"labels": {}, "annotator": "a\\nb"}', "enter a name"),
        (b'{"labels": {}, "annotator": "Ann", "unit": "?"}', "no such pair"),
        (b" " * 2**17, "more than"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_stored(client, sent, message):
    reply = client.post("/secret/label", content=sent)
    assert reply.status_code == 400
    assert message in reply.json()["error"]
    assert (client.folder / LOG).read_text() == ""


def test_only_files_of_the_pairs_are_sent(client):
    pair = client.items[0].id
    for name in ("A", "B", "0", "1"):
        assert client.get(f"/secret/media/{pair}/{name}").status_code == 200
    for address in (
        f"{pair}/2",
        f"{pair}/C",
        f"{pair}/-1",
        "other/A",
        f"{pair}/..%2f..%2fpairs.csv",
    ):
        assert client.get(f"/secret/media/{address}").status_code == 404
    part = client.get(f"/secret/media/{pair}/A", headers={"range": "bytes=0-9"})
    assert (part.status_code, len(part.content)) == (206, 10)  # browsers seek in videos


def test_videos_that_browsers_do_not_play_are_converted(tmp_path):
    path = write_label_pairs(tmp_path, 1)
    path.write_text(path.read_text().replace("1.mp4", "fine.mp4"))
    (item,) = load_items(path, ("SA",))
    (tmp_path / "converted").mkdir()
    media = Media([item], tmp_path / "converted")
    assert media.file(item.id, "A") == tmp_path / "0.mp4"
    with av.open(str(media.file(item.id, "B"))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert len(list(container.decode(stream))) == 4


def test_a_damaged_video_is_an_error_of_its_own_pair(tmp_path):
    path = write_label_pairs(tmp_path, 1)
    (tmp_path / "1.mp4").write_bytes(b"nothing")
    items = load_items(path, ("SA",))
    (tmp_path / "converted").mkdir()
    desk = Desk(items, [], ("SA",), tmp_path)
    app = make_app(desk, Media(items, tmp_path / "converted"), "t", tmp_path / "out.csv")
    with testclient.TestClient(app) as client:
        reply = client.get(f"/t/media/{items[0].id}/B")
        assert reply.status_code == 422
        assert "1.mp4" in reply.json()["error"]
        assert client.get(f"/t/media/{items[0].id}/A").status_code == 200
