"""Models by their names on the Hugging Face Hub, which a server on loopback stands for."""

import os
import subprocess
import sys

import pytest

from jax_idgrpo.config import EMBEDDED
from tests.helpers.hub_server import serving
from tests.helpers.paths import ROOT

pytest.importorskip("huggingface_hub")
NAME = "people/small-vace"
VAE = "vae/diffusion_pytorch_model.safetensors"


def inspect(name, address, cache):
    """Run `idgrpo-convert inspect` with a hub at an address and an empty cache."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "checkpoints_convert", "inspect", name]
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)


def test_an_interrupted_download_is_continued_and_then_kept(tmp_path):
    with serving(EMBEDDED / "pipeline", NAME, broken=VAE) as address:
        failed = inspect(NAME, address, tmp_path)
    assert failed.returncode == 2
    assert f"run: hf download {NAME} --local-dir small-vace" in failed.stderr
    with serving(EMBEDDED / "pipeline", NAME) as address:
        assert "complete: every tensor of the 3 networks" in inspect(NAME, address, tmp_path).stdout
    kept = inspect(NAME, address, tmp_path)  # the server is gone
    assert "complete: every tensor of the 3 networks" in kept.stdout
    assert "downloading" not in kept.stderr


def test_a_name_that_is_not_on_the_hub_leaves_no_entry(tmp_path):
    with serving(EMBEDDED / "pipeline", NAME) as address:
        failed = inspect("people/other", address, tmp_path)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "people/other: does not exist here" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "models--people--other").exists()
