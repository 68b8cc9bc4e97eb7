"""Files of face networks as deepface, insightface and CurricularFace publish them: recognised, in and out with every bit."""

import json

import numpy as np
import pytest

from checkpoints_convert import arcface, checkpoint, faces, identify, network, store
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.arcface import IRESNET_34, IRESNET_50
from jax_idgrpo.models.faces.facenet import FacenetConfig
from jax_idgrpo.models.faces.retinaface import RetinaFaceConfig
from tests.helpers.convert import run
from tests.helpers.convert_faces import FILES, LARGE, assert_every_bit_comes_back, published


@pytest.mark.parametrize("name", [name for name in FILES if name not in LARGE])
def test_a_published_file_goes_in_and_out_with_every_bit(tmp_path, capsys, name):
    assert_every_bit_comes_back(tmp_path, capsys, name)


def test_the_store_holds_the_network_under_our_names(tmp_path):
    tensors = published("facenet", FacenetConfig(embedding_size=512))
    store.write_file(tmp_path / "download.pth", tensors)
    assert run("import", tmp_path / "download.pth", tmp_path / "store") == 0
    assert json.loads((tmp_path / "store" / "config.json").read_text())["architecture"] == "facenet"
    found = checkpoint.open_checkpoint(tmp_path / "store").networks[identify.FACE]
    kernel = np.asarray(network.ours(found)["bottleneck.kernel"])
    np.testing.assert_array_equal(kernel, tensors["bottleneck.weight"].T)


def lacking(tensors):
    del tensors["layer2.0.bn1.bias"]


def reshaped(tensors):
    tensors["fc.weight"] = tensors["fc.weight"][:, :-1]


def added(tensors):
    tensors["head.weight"] = np.zeros((2, 2), np.float32)


def spoilt(tensors):
    tensors["fc.bias"][3] = np.nan


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lacking, r"download\.pth.*1 missing: layer2\.0\.bn1\.bias"),
        (
            reshaped,
            r"download\.pth.*1 mis-shaped: fc\.weight \[512, 25087\] instead of \[512, 25088\]",
        ),
        (added, r"download\.pth.*1 unexpected: head\.weight"),
        (spoilt, r"fc\.bias holds NaN"),
    ],
)
def test_a_spoilt_file_is_one_line_and_nothing_is_written(tmp_path, spoil, match):
    tensors = published("arcface", IRESNET_34)
    spoil(tensors)
    store.write_file(tmp_path / "download.pth", tensors)
    with pytest.raises(UserError, match=match) as caught:
        run("import", tmp_path / "download.pth", tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_what_a_face_network_has_no_use_for_is_refused(tmp_path):
    store.write_file(tmp_path / "download.pth", published("retinaface", RetinaFaceConfig()))
    with pytest.raises(UserError, match=r"is a face network; choose original"):
        run("export", tmp_path / "download.pth", tmp_path / "out", "--format", "diffusers")
    with pytest.raises(UserError, match=r"--with .* is a face network, which needs none"):
        run("import", tmp_path / "download.pth", tmp_path / "out", "--with", tmp_path)
    with pytest.raises(UserError, match=r"--as vace"):
        run("import", tmp_path / "download.pth", tmp_path / "out", "--as", "vace")


def test_depths_of_one_family_are_told_apart():
    for config in (IRESNET_34, IRESNET_50):
        assert (
            faces.known(
                {rule.torch: np.empty(1) for rule in arcface.names(config)}
                | {arcface.UNIT_SCALE: np.ones(1)}
            )[2]
            == config
        )
