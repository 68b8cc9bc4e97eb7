"""The published face networks with random weights, and the folder that the command makes of them."""

import os

import numpy as np
import pytest
import torch

from checkpoints_convert.__main__ import run
from jax_idgrpo.errors import UserError


def random_state(model, seed, unit_gamma=False, gain=1.0):
    """The weights behind the reference arrays: uniform numbers in the order of the state dict."""
    rng = np.random.RandomState(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        shape = tuple(tensor.shape)
        u = rng.random_sample(shape)
        if name == "bn_data.running_mean":
            value = 100 + 50 * u
        elif name == "bn_data.running_var":
            value = 2000 + 2000 * u
        elif name.endswith(("running_mean", "bias")):
            value = 0.4 * u - 0.2
        elif name.endswith("running_var"):
            value = 0.5 + u
        elif len(shape) == 1:
            value = np.ones(shape) if unit_gamma else 0.5 + u
        else:
            value = (2 * u - 1) * np.sqrt(3 * gain / np.prod(shape[1:]))
        state[name] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(state, strict=False)
    return model.eval()


def channels_first(images):
    """Return images [B H W C] as a tensor [B C H W]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def make_originals():
    """Return the libraries' RetinaFace and Facenet with random weights."""
    os.environ["DEEPFACE_BACKEND_ENGINE"] = "pytorch"
    from deepface.models.facial_recognition.pytorch.Facenet import InceptionResNetV1
    from retinaface.model.retinaface_pth_model import RetinaFace

    return {
        "detector": random_state(RetinaFace(), 1124),
        "embedder": random_state(InceptionResNetV1(dimension=512), 1123, unit_gamma=True, gain=2.0),
    }


def make_folder(originals, tmp_path_factory):
    """What the command makes of files as the libraries download them."""
    place = tmp_path_factory.mktemp("faces")
    torch.save(originals["detector"].state_dict(), place / "retinaface.pth")
    torch.save(originals["embedder"].state_dict(), place / "facenet512_weights.pth")
    words = [
        "faces",
        str(place / "made"),
        "--detector",
        str(place / "retinaface.pth"),
        "--embedder",
    ]
    assert run([*words, str(place / "facenet512_weights.pth")]) == 0
    with pytest.raises(UserError, match=r"--embedder .*RetinaFace-R50; give an embedder"):
        run(["faces", str(place / "other"), *words[2:], str(place / "retinaface.pth")])
    assert not (place / "other").exists()
    return place / "made"
