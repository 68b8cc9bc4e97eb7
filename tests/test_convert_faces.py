"""Files of face networks as deepface, insightface and CurricularFace publish them: recognised, in and out with every bit."""

import json

import numpy as np
import pytest

from checkpoints_convert import arcface, checkpoint, faces, identify, network, rules, store
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.arcface import ARCFACE_R34, IR_101, IRESNET_34, IRESNET_50
from jax_idgrpo.models.faces.facenet import FacenetConfig
from jax_idgrpo.models.faces.retinaface import RetinaFaceConfig
from tests.test_convert import run

FILES = {  # the name it is published under -> what it holds; full size, for shapes are how some of them are told apart
    "retinaface.pth": ("RetinaFace-R50", "retinaface", RetinaFaceConfig()),
    "facenet_weights.pth": ("Facenet, 128 numbers", "facenet", FacenetConfig(embedding_size=128)),
    "facenet512_weights.pth": (
        "Facenet, 512 numbers",
        "facenet",
        FacenetConfig(embedding_size=512),
    ),
    "arcface_weights.pth": ("ArcFace-R34 of deepface", "arcface", ARCFACE_R34),
    "backbone.pth": ("IResNet-34", "arcface", IRESNET_34),
    "CurricularFace_Backbone.pth": ("IR-101 of CurricularFace", "arcface", IR_101),
}


def published(architecture: str, config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under the published names, with a counter beside each running mean as PyTorch writes it."""
    abstract = faces.abstract(architecture, config)
    rng, tensors = np.random.default_rng(seed), {}
    for slot in rules.expand(faces.table(architecture, config, abstract), abstract):
        tensors[slot.torch] = rng.random(slot.torch_shape, np.float32) + 0.5
        if slot.torch.endswith("running_var"):
            tensors[slot.torch.replace("running_var", faces.COUNTER)] = np.array(
                rng.integers(1, 10**6), np.int64
            )
    if architecture == "arcface" and config.embedding_norm == "bias":
        tensors[arcface.UNIT_SCALE] = np.ones(config.embedding_size, np.float32)
    return tensors


def bits(path) -> dict[str, tuple]:
    return {
        name: (tensor.shape, str(tensor.dtype), np.asarray(tensor).tobytes())
        for name, tensor in store.open_file(path)[0].items()
    }


SLOW = ("facenet_weights.pth", "CurricularFace_Backbone.pth")  # as the others, and large


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FILES]
)
def test_a_published_file_goes_in_and_out_with_every_bit(tmp_path, capsys, name):
    what, architecture, config = FILES[name]
    store.write_file(tmp_path / "download.pth", published(architecture, config))
    assert run("inspect", tmp_path / "download.pth") == 0
    said = capsys.readouterr().out
    assert f"face: {what}, original layout" in said and "not here" not in said
    assert run("import", tmp_path / "download.pth", tmp_path / "store") == 0
    assert run("inspect", tmp_path / "store") == 0
    assert f"face: {what}, store layout" in capsys.readouterr().out
    assert run("verify", tmp_path / "store", tmp_path / "download.pth") == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "original") == 0
    assert bits(tmp_path / "out" / name) == bits(tmp_path / "download.pth")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {what}" in card and 'license: "other"' in card and "video" not in card


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
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


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
