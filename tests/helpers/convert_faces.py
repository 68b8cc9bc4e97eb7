"""Files of face networks at their published sizes, and their round trip."""

import numpy as np

from checkpoints_convert import arcface, faces, rules, store
from jax_idgrpo.models.faces.arcface import ARCFACE_R34, IR_101, IRESNET_34
from jax_idgrpo.models.faces.facenet import FacenetConfig
from jax_idgrpo.models.faces.retinaface import RetinaFaceConfig
from tests.helpers.convert import run

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
    """Return shape, dtype and bits of every tensor of a file."""
    return {
        name: (tensor.shape, str(tensor.dtype), np.asarray(tensor).tobytes())
        for name, tensor in store.open_file(path)[0].items()
    }


LARGE = ("facenet_weights.pth", "CurricularFace_Backbone.pth")


def assert_every_bit_comes_back(tmp_path, capsys, name):
    """A published file is recognised, imported, verified and exported again with the same bits."""
    what, architecture, config = FILES[name]
    store.write_file(tmp_path / "download.pth", published(architecture, config))
    assert run("inspect", tmp_path / "download.pth") == 0
    said = capsys.readouterr().out
    assert f"face: {what}, original layout" in said
    assert "not here" not in said
    assert run("import", tmp_path / "download.pth", tmp_path / "store") == 0
    assert run("inspect", tmp_path / "store") == 0
    assert f"face: {what}, store layout" in capsys.readouterr().out
    assert run("verify", tmp_path / "store", tmp_path / "download.pth") == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "original") == 0
    assert bits(tmp_path / "out" / name) == bits(tmp_path / "download.pth")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {what}" in card
    assert 'license: "other"' in card
    assert "video" not in card
