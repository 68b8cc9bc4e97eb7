"""Prompts CSV: what is read, what each kind of bad input gets, and the order of training."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.prompts import HEADER, make_folder, write


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photos_that_were_checked_are_not_kept(folder, suffix):
    """40 photos of 12 MB each take less memory than 5 of them."""
    stripes = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 2000, 3), np.uint8), 1500, 0)
    Image.fromarray(stripes).save(folder / f"0.{suffix}")
    for number in range(1, 40):
        (folder / f"{number}.{suffix}").hardlink_to(folder / f"0.{suffix}")
    path = write(folder, HEADER + "".join(f"{number}.{suffix},x\n" for number in range(40)))
    code = f"""
import os, resource
os.cpu_count = lambda: 2
from jax_idgrpo.data import prompts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(prompts.load_prompts({str(path)!r}, 1)) == 40
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 5 * 4 * stripes.size / 3
