"""Photos: which files are read and how they look, what is said of the others, and how often a file is opened."""

import subprocess
import sys

from PIL import Image


def test_large_photos_are_read_without_alarm_and_larger_ones_are_told_to_shrink(tmp_path):
    """In a process of its own, whose warnings are as a user sees them."""
    Image.new("1", (10000, 10000), 1).save(tmp_path / "large.png")
    Image.new("1", (16000, 15000), 1).save(tmp_path / "huge.png")
    code = f"""
from jax_idgrpo.data.photos import check_photo
from jax_idgrpo.errors import UserError
check_photo({str(tmp_path / "large.png")!r})
try:
    check_photo({str(tmp_path / "huge.png")!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == f"image {tmp_path}/huge.png: has 240 megapixels, and up to 178 are read; make it smaller\n"
    )
    assert done.stderr == ""
