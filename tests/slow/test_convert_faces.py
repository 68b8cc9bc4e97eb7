"""Files of face networks as deepface, insightface and CurricularFace publish them: recognised, in and out with every bit."""

import pytest

from tests.helpers.convert_faces import LARGE, assert_every_bit_comes_back


@pytest.mark.parametrize("name", LARGE)
def test_a_large_published_file_goes_in_and_out_with_every_bit(tmp_path, capsys, name):
    assert_every_bit_comes_back(tmp_path, capsys, name)
