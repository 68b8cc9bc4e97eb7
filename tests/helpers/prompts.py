"""A prompts CSV with its photos."""

import numpy as np
from PIL import Image

HEADER = "ref_paths,prompt\n"


def write(folder, text, name="prompts.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def make_folder(tmp_path):
    (tmp_path / "faces").mkdir()
    for number, name in enumerate(("a.png", "b.png", "faces/c.jpg")):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path
