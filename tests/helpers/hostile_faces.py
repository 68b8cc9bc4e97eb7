"""Small files of face networks, and the one line that a damaged one gets."""

import functools

import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.faces.dlib_resnet import DlibResNetConfig
from jax_idgrpo.models.faces.yunet import YuNetConfig
from tests.helpers import face_files


def refused(path, data, reader, match):
    """Write `data` to `path`; `reader` raises a UserError of one short line that matches."""
    path.write_bytes(data)
    with pytest.raises(UserError, match=match) as caught:
        reader(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@functools.cache
def yunet(quantised=True):
    """Return the bytes of an ONNX file of YuNet with random weights."""
    tensors = face_files.random_tensors("yunet", YuNetConfig())
    return face_files.yunet_file(
        tensors,
        quantised=[name for name, tensor in tensors.items() if quantised and tensor.ndim == 4],
    )


@functools.cache
def dlib():
    """Return the bytes of a dlib file with random weights."""
    config = DlibResNetConfig()
    return face_files.dlib_file(face_files.random_tensors("dlib_resnet", config), config)
