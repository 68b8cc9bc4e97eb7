"""Readers of ONNX and dlib files, and the command that uses them.

Whatever a file holds: one line or the right tensors, and nothing half-written.
"""

import numpy as np
import pytest

from checkpoints_convert import dlib_dat, onnx
from jax_idgrpo.errors import UserError
from tests.helpers.face_files import field
from tests.helpers.hostile_faces import dlib, refused, yunet


def test_an_onnx_file_of_endless_fields_is_left_early(tmp_path):
    many = field(7, b"\x18\x00" * (onnx.FIELD_LIMIT + 10))
    refused(tmp_path / "a.onnx", field(1, 8) + many, onnx.open_file, "more than 1,000,000 fields")
    packed = field(7, field(1, field(5, field(8, b"\x01" * (onnx.FIELD_LIMIT + 10)))))
    refused(
        tmp_path / "a.onnx", field(1, 8) + packed, onnx.open_file, "more than 1,000,000 numbers"
    )


@pytest.mark.parametrize(
    ("data", "reader", "name"),
    [(yunet, onnx.open_file, "a.onnx"), (dlib, dlib_dat.open_file, "a.dat")],
)
def test_flipped_bytes_are_read_or_refused_in_one_line(tmp_path, data, reader, name):
    whole, rng = data(), np.random.default_rng(0)
    for at in rng.integers(0, 2000, 60):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(broken)
        line = ""
        try:
            reader(tmp_path / name)
        except UserError as error:
            line = str(error)
        assert "\n" not in line
