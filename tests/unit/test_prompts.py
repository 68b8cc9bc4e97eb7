"""Prompts CSV: what is read, what each kind of bad input gets, and the order of training."""

import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import prompts_file
from jax_idgrpo.data.photos import load_reference, on_white
from jax_idgrpo.data.prompts import (
    Prompt,
    describe_change,
    load_prompts,
    prompt_batch,
    prompts_digest,
    row_digests,
)
from jax_idgrpo.errors import UserError
from tests.helpers.prompts import HEADER, make_folder, write


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_rows_of_different_counts(folder):
    absolute = folder / "b.png"
    path = write(
        folder,
        HEADER
        + f'a.png,one person waves\n\na.png; faces/c.jpg ,"two people, talking"\n{absolute},last\n',
    )
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
        (
            HEADER + "a.png;b.png;a.png,three\n",
            "line 2: 3 reference photos, but data.max_people is 2",
        ),
        (HEADER + "a.png,one, two\n", "line 2: more fields than the header has"),
        (HEADER + "a.png\n", "line 2: fewer fields than the header has"),
        (HEADER + 'a.png,"open\n', "check the quotes"),
        (
            HEADER + "a.png,fine\nmissing.png,x\n",
            "line 3: image {folder}/missing.png: no such file",
        ),
        (
            HEADER + "faces,x\n",
            "line 2: image {folder}/faces: is a folder; name the image file in it",
        ),
        (
            HEADER + "prompts.csv,x\n",
            "line 2: image {folder}/prompts.csv: cannot be read (not an image)",
        ),
        (HEADER.encode() + b"a.png,caf\xe9\n", "is not UTF-8 text"),
        (
            'ref_paths;prompt\n"a.png;b.png";two people\n',
            "line 1: columns are separated by semicolons (;); save the file with commas",
        ),
        ("sep=;\nref_paths;prompt\na.png;one\n", "columns are separated by semicolons (;)"),
        ("sep=\t\r\nref_paths\tprompt\r\na.png\tone\r\n", "columns are separated by tabs"),
        ('"Prompt"\t"Ref_Paths"\nx\ta.png\n', "columns are separated by tabs"),
        (
            "image,prompt\na.png,x\n",
            "line 1: needs one column ref_paths and has image, prompt; start the file",
        ),
        (
            "Prompt,prompt,ref_paths\nx,y,a.png\n",
            "line 1: needs one column prompt and has prompt, prompt, ref_paths",
        ),
        (
            '{"ref_paths": ["a.png"], "prompt": "x"}\n',
            "holds JSON; write a CSV with the header ref_paths,prompt",
        ),
        ("<!DOCTYPE html><html></html>", "is a web page; write a CSV"),
        (
            b"PK\x03\x04" + bytes(30),
            "is an Excel workbook or another archive; save the sheet as CSV in UTF-8",
        ),
        (b"\xd0\xcf\x11\xe0" + bytes(30), "is an Excel workbook"),
        (
            HEADER + 'a.png, b.png,"two people"\n',
            "line 2: photos are joined by commas; join them by ;",
        ),
        (HEADER + '"a.png,b.png",two people\n', "a.png,b.png: no such file; join the photos by ;"),
        (HEADER + "a.png|b.png,two people\n", "no such file; join the photos by ;"),
        (
            HEADER + "a.png,\u201cOne, two.\u201d\n",
            'line 2: more fields than the header has; put the prompt in straight quotes (")',
        ),
        (
            HEADER + "https://example.com/a.png,x\n",
            "line 2: image https://example.com/a.png: is a web address; download the photo",
        ),
        (
            HEADER + "C:\\Users\\me\\a.png,x\n",
            "relative to the CSV, and a.png is beside it: write a.png",
        ),
        (
            HEADER + "D:/photos/z.png,x\n",
            "no such file; it is a Windows path; copy the photos beside the CSV",
        ),
        (
            HEADER + "data/people/a.png,x\n",
            "no such file; ref_paths are relative to the CSV, and a.png is beside it",
        ),
        (HEADER + "faces\\c.jpg,x\n", "no such file; write / between folders: faces/c.jpg"),
        (HEADER + "~/no-such-photo.png,x\n", "/no-such-photo.png: no such file"),
        (
            HEADER + f"{'so long a text that it is no name ' * 20},a.png\n",
            "no such file; check ref_paths",
        ),
        (HEADER + 'a.png,"two\nlines"\nmissing.png,x\n', "line 4: image {folder}/missing.png"),
        (HEADER + 'missing.png,"two\nlines"\n', "line 2: image {folder}/missing.png"),
    ],
)
def test_bad_files(folder, text, says):
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load_prompts(path, 2)
    message = str(caught.value)
    assert str(path) in message
    assert says.format(folder=folder) in message
    assert "\n" not in message


def test_rows_of_nothing_but_blanks_and_commas_are_empty(folder):
    text = HEADER + "\n   \na.png,one\n,\n , ,,\nb.png,two,,\n\t\n"
    assert [prompt.text for prompt in load_prompts(write(folder, text), 2)] == ["one", "two"]
    assert [prompt.where.rpartition(" ")[2] for prompt in load_prompts(write(folder, text), 2)] == [
        "4",
        "7",
    ]


def test_spaces_after_commas_and_another_case_of_the_header(folder):
    path = write(folder, 'Ref_Paths, PROMPT\na.png; b.png, "two people, talking"\n')
    assert load_prompts(path, 2) == [
        Prompt(0, "two people, talking", (folder / "a.png", folder / "b.png"))
    ]
    assert load_prompts(write(folder, "sep=,\n" + path.read_text()), 2)[0].where.endswith("line 3")


def test_names_are_found_however_letters_are_composed(folder):
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        stored = folder / unicodedata.normalize(form, f"Zo\u00eb {form}.png")
        shutil.copy(folder / "a.png", stored)
        path = write(
            folder, HEADER + unicodedata.normalize(other, f"Zo\u00eb {form}.png") + ",one\n"
        )
        assert load_prompts(path, 1)[0].references[0].read_bytes() == stored.read_bytes()


def test_home_is_found_in_ref_paths_and_in_the_name_of_the_csv(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert load_prompts(write(folder, HEADER + "~/a.png,one\n"), 1)[0].references == (
        folder / "a.png",
    )
    assert prompts_file("~/prompts.csv") == folder / "prompts.csv"


def test_a_photo_beside_the_current_folder_is_pointed_out(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(
        UserError, match="a.png is in the current folder, but ref_paths are relative to the CSV"
    ):
        load_prompts(write(folder / "faces", HEADER + "a.png,one\n"), 1)


def test_all_that_is_wrong_is_told_in_one_line(folder):
    (folder / "broken.png").write_bytes(b"nothing")
    bad = (
        "a.png,\nmissing.png;gone.png,x\na.png,fine\nbroken.png,x\n" + "a.png;b.png;a.png,x\n" * 20
    )
    path = write(folder, HEADER + bad)
    with pytest.raises(UserError) as caught:
        load_prompts(path, 2)
    first, *parts, rest = str(caught.value).split(" | ")
    assert first == f"prompts {path}: 24 problems"
    assert "\n" not in str(caught.value)
    assert [part.split(":")[0] for part in parts] == ["line 2", "line 3", "line 3"]
    assert "missing.png" in parts[1]
    assert "gone.png" in parts[2]
    assert rest == "and 21 more, lines 5, 6, 7, 8, 9, 10, 11, 12, ..."


def test_one_photo_twice_in_a_row_gets_a_warning(folder):
    shutil.copy(folder / "a.png", folder / "copy.png")
    for names in ("a.png;a.png", "a.png;copy.png"):
        path = write(folder, HEADER + f"faces/c.jpg,one\n{names},two\n")
        with pytest.warns(UserWarning, match=f"{path}, line 3: shows one photo twice"):
            assert len(load_prompts(path, 2)) == 2


def test_what_looks_odd_about_a_photo_is_told_with_its_line(folder):
    Image.fromarray(np.full((20, 20), 4080, np.uint16)).save(folder / "grey.tif")
    with pytest.warns(
        UserWarning, match=r"prompts.csv, line 2: image .*grey.tif: holds 12 bits in 16-bit words"
    ):
        load_prompts(write(folder, HEADER + "grey.tif,one\n"), 1)


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
    with pytest.raises(
        UserError, match=rf"line 3: image .*{name}: cannot be read .*store it again"
    ):
        load_prompts(write(folder, HEADER + f"a.png,fine\n{name},x\n"), 2)


def test_what_another_program_would_draw_is_no_photo(folder):
    Image.new("RGB", (4, 4)).save(folder / "drawing.png", format="EPS")
    with pytest.raises(UserError, match=r"drawing.png: cannot be read \(not an image\)"):
        load_prompts(write(folder, HEADER + "drawing.png,x\n"), 2)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
)
def test_every_mode_becomes_rgb(mode):
    grey = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (8, 1))
    if mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = Image.fromarray(np.repeat(grey[..., None], 3, -1)).convert(
            mode, **({"dither": 0} if mode == "1" else {})
        )
    got = np.asarray(on_white(image))
    assert got.shape == (8, 16, 3)
    assert got.dtype == np.uint8
    spread = {"1": 130, "P": 26}.get(mode, 8)
    assert np.abs(got.astype(int) - grey[..., None]).max() <= spread


def test_transparent_parts_become_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[:, :2, 3], pixels[:, 2, 3] = 200, 255, 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = np.asarray(load_reference(tmp_path / "a.png"))
    assert (got[:, :2] == (200, 0, 0)).all()
    assert (got[:, 3] == 255).all()
    assert (abs(got[:, 2, 1].astype(int) - 127) <= 1).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    got = np.asarray(load_reference(tmp_path / "p.png")).reshape(-1, 3)
    assert got[0].tolist() == [255, 255, 255]
    assert (got[1:] == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white quarter at the top left
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


def digest_of(path):
    return prompts_digest(load_prompts(path, 2))


def test_the_digest_is_that_of_what_is_used(folder):
    path = write(folder, HEADER + 'a.png,"one"\na.png;b.png,two\n')
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (24, 20, 3), np.uint8)).save(
        folder / "b.png"
    )
    digest = digest_of(path)
    shutil.copy(folder / "a.png", folder / "renamed.png")
    for same in (
        "note,prompt,ref_paths\nx,one,a.png\n\n,,\ny, two,a.png ; b.png\n",
        HEADER + "renamed.png,one\na.png;b.png,two\n",
    ):
        assert digest_of(write(folder, same, "other.csv")) == digest
    others = ("a.png,two\na.png;b.png,one\n", "a.png;b.png,two\na.png,one\n", "a.png,one\nb.png;a.png,two\n", "a.png,one\n",
              "a.png,one\na.png;b.png,two\na.png,one\n")  # fmt: skip
    assert (
        len({digest, *(digest_of(write(folder, HEADER + rows, "other.csv")) for rows in others)})
        == 6
    )
    by_hand = [
        Prompt(0, "one", (folder / "a.png",)),
        Prompt(1, "two", (folder / "a.png", folder / "b.png")),
    ]
    assert prompts_digest(by_hand) == digest
    content = bytearray((folder / "b.png").read_bytes())
    content[-1] ^= 1  # of the end mark: the picture is the same, the file is not
    (folder / "b.png").write_bytes(content)
    assert prompts_digest(by_hand) != digest


def test_a_change_is_described_by_its_rows(folder):
    def rows(*texts):
        return row_digests(
            [Prompt(n, text, (), digests=(photo,)) for n, (text, photo) in enumerate(texts)]
        )

    old = rows(*((f"text {n}", f"photo {n}") for n in range(12)))
    assert describe_change(old, list(old)) == ""
    assert describe_change(old, old[::-1]) == "the same 12 rows in another order"
    assert describe_change(old, old[:3] + old[5:]) == "rows 3, 4 removed (rows counted from 0)"
    assert (
        describe_change(old, old[:3] + rows(("new", "x")) + old[3:])
        == "row 3 added (rows counted from 0)"
    )
    edited = old.copy()
    edited[2:3], edited[7:8] = rows(("text 2", "another")), rows(("text", "photo 7"))
    assert (
        describe_change(old, edited)
        == "row 7 has another text; row 2 has other photos (rows counted from 0)"
    )
    assert describe_change(old, old[:2] + rows(("new", "x"))) == (
        "row 2 added; rows 2, 3, 4, 5, 6, 7, 8, 9, ... removed (rows counted from 0)"
    )
    assert describe_change([], old[:1]) == "row 0 added (rows counted from 0)"
