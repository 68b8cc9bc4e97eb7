"""Prompts CSV: what is read, what each kind of bad input gets, and the order of training."""

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.data.prompts import Prompt, load_prompts, load_reference, on_white, prompt_batch
from jax_idgrpo.errors import UserError

HEADER = "ref_paths,prompt\n"


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    (tmp_path / "faces").mkdir()
    for name in ("a.png", "b.png", "faces/c.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def write(folder, text, name="prompts.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_of_different_counts(folder):
    absolute = folder / "b.png"
    path = write(folder, HEADER + f'a.png,one person waves\n\na.png; faces/c.jpg ,"two people, talking"\n{absolute},last\n')
    assert load_prompts(path, 3) == [
        Prompt(0, "one person waves", (folder / "a.png",)),
        Prompt(1, "two people, talking", (folder / "a.png", folder / "faces/c.jpg")),
        Prompt(2, "last", (absolute,)),
    ]
    assert [prompt.people for prompt in load_prompts(path, 3)] == [1, 2, 1]


def test_columns_in_any_order_with_a_byte_order_mark(folder):
    path = write(folder, b"\xef\xbb\xbfnote,prompt, ref_paths\r\nx,hello,a.png\r\n")
    assert load_prompts(path, 1) == [Prompt(0, "hello", (folder / "a.png",))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: needs one column ref_paths"),
        ("a.png,hello\n", "line 1: needs one column ref_paths"),
        ("ref_paths,text\na.png,hello\n", "line 1: needs one column prompt"),
        ("ref_paths,prompt,prompt\na.png,x,y\n", "line 1: needs one column prompt"),
        (HEADER, "no rows below the header"),
        (HEADER + "a.png,fine\na.png,   \n", "line 3: the prompt is empty"),
        (HEADER + ",nobody\n", "line 2: no reference photo; name 1 to 2"),
        (HEADER + "a.png;;b.png,gap\n", "line 2: an empty name in ref_paths"),
        (HEADER + "a.png;b.png;a.png,three\n", "line 2: 3 reference photos, but data.max_people is 2"),
        (HEADER + "a.png,one, two\n", "line 2: more fields than the header has"),
        (HEADER + "a.png\n", "line 2: fewer fields than the header has"),
        (HEADER + 'a.png,"open\n', "check the quotes"),
        (HEADER + "a.png,fine\nmissing.png,x\n", "line 3: image {folder}/missing.png: no such file"),
        (HEADER + "faces,x\n", "line 2: image {folder}/faces: no such file"),
        (HEADER + "prompts.csv,x\n", "line 2: image {folder}/prompts.csv: cannot be read (not an image)"),
        (HEADER.encode() + b"a.png,caf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_bad_files(folder, text, says):
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load_prompts(path, 2)
    message = str(caught.value)
    assert str(path) in message and says.format(folder=folder) in message and "\n" not in message


def test_missing_file_and_folder(folder):
    for path, says in ((folder / "none.csv", "no such file"), (folder, "is a folder")):
        with pytest.raises(UserError, match=says):
            load_prompts(path, 2)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_truncated_image_is_found_at_the_start(folder, name):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"line 3: image .*{name}: cannot be read .*store it again"):
        load_prompts(write(folder, HEADER + f"a.png,fine\n{name},x\n"), 2)


def test_what_another_program_would_draw_is_no_photo(folder):
    Image.new("RGB", (4, 4)).save(folder / "drawing.png", format="EPS")
    with pytest.raises(UserError, match=r"drawing.png: cannot be read \(not an image\)"):
        load_prompts(write(folder, HEADER + "drawing.png,x\n"), 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (8, 1))
    if mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(np.repeat(grey[..., None], 3, -1)).convert(mode, **({"dither": 0} if mode == "1" else {}))
    got = np.asarray(on_white(image))
    assert got.shape == (8, 16, 3) and got.dtype == np.uint8
    spread = {"1": 130, "P": 26}.get(mode, 8)
    assert np.abs(got.astype(int) - grey[..., None]).max() <= spread


def test_transparent_parts_become_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:, :2, 3], pixels[:, 2, 3] = 200, 255, 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = np.asarray(load_reference(tmp_path / "a.png"))
    assert (got[:, :2] == (200, 0, 0)).all() and (got[:, 3] == 255).all() and (abs(got[:, 2, 1].astype(int) - 127) <= 1).all()
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(load_reference(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # white quarter at the top left
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
              6: np.rot90(upright, 1), 7: upright.swapaxes(0, 1)[::-1, ::-1], 8: np.rot90(upright, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_reference(tmp_path / "a.png")), upright)


def test_order_is_a_permutation_per_pass_and_resumes_by_step(folder):
    prompts = [Prompt(k, "x", (folder / "a.png",)) for k in range(10)]
    sequence = [k for step in range(15) for k in prompt_batch(prompts, 3, step, 4)]
    passes = [sequence[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 6
    assert prompt_batch(prompts, 3, 7, 4) == sequence[28:32]
    assert prompt_batch(prompts, 4, 7, 4) != sequence[28:32]
    assert [k for step in range(3) for k in prompt_batch(prompts, 3, step, 20)] == sequence[:60]
