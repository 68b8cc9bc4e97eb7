"""Published layouts of the golden models."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints_convert import (
    store,
)
from tests.helpers.paths import GOLDEN

WAN, VACE = GOLDEN / "wan_original_tiny", GOLDEN / "vace_original_tiny"
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


def recast(folder: Path, how: str) -> None:
    """Every file of weights in `folder` in float32, bfloat16, or, tensor by tensor, one or the other."""
    for file in [file for file in folder.rglob("*") if file.suffix in (".pth", ".safetensors")]:
        tensors = {name: np.array(tensor) for name, tensor in store.open_file(file)[0].items()}
        for index, (name, value) in enumerate(tensors.items()):
            half = how == "bfloat16" or (how == "mixed" and index % 3 == 1)
            tensors[name] = value.astype(ml_dtypes.bfloat16 if half else np.float32)
        store.write_file(file, tensors)


def original(tmp_path: Path, which: str, how: str = "mixed") -> Path:
    """A whole folder of the original layout."""
    folder = shutil.copytree(WAN, tmp_path / f"{which}-source")
    if which == "vace":
        shutil.copytree(VACE, folder, dirs_exist_ok=True)
    recast(folder, how)
    return folder
