"""A prompts CSV with its photos."""

import numpy as np
from PIL import Image

from jax_idgrpo.config import prompts_file
from jax_idgrpo.data.prompts import load_prompts

HEADER = "ref_paths,prompt\n"


def write_bundled_prompts(path, split, count):
    """Write a CSV of the first `count` bundled prompts of a split, with whole paths of their photos."""
    with path.open("w") as file:
        file.write(HEADER)
        for prompt in load_prompts(prompts_file(f"embedded:{split}"), 4)[:count]:
            photos = ";".join(str(photo.absolute()) for photo in prompt.references)
            file.write(f'{photos},"{prompt.text}"\n')


def write(folder, text, name="prompts.csv"):
    """Write a CSV, of text or bytes, and return its path."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def make_folder(tmp_path):
    """Add three photos, one of them in a folder of its own."""
    (tmp_path / "faces").mkdir()
    for number, name in enumerate(("a.png", "b.png", "faces/c.jpg")):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path
