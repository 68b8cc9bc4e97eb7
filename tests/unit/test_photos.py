"""Photos: which files are read and how they look, and what is said of the others."""

import hashlib
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageFile

from jax_idgrpo.data import photos
from jax_idgrpo.data.photos import (
    check_photo,
    decode_photo,
    identify_photo,
    load_reference,
    on_white,
)
from jax_idgrpo.errors import UserError
from tests.helpers.decodes import count_decodes

RAMP = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (16, 1))


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


def box(brand, *others):
    brands = b"".join(name.encode() for name in (brand, *others))
    return (
        struct.pack(">I", 12 + 4 + 4 * len(others))
        + b"ftyp"
        + brands[:4]
        + bytes(4)
        + brands[4:]
        + bytes(40)
    )


FILES = {
    "empty file": (b"", "is an empty file"),
    "HEIC": (box("heic", "mif1", "heic"), "is a HEIC photo"),
    "HEIC of several pictures": (box("mif1", "heic"), "is a HEIC photo"),
    "video": (box("isom", "mp42"), "is a video"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "is a JPEG XL photo"),
    "PDF": (b"%PDF-1.4\n%%EOF\n", "is a PDF document"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="x"></svg>', "is an SVG drawing"),
    "page": (b"<!DOCTYPE html><html>sign in</html>", "is a web page; download the photo itself"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer; run git lfs pull",
    ),
    "text": (b"hello", "cannot be read (not an image)"),
}


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)  # another test may have registered it
    photos._formats.cache_clear()
    yield
    photos._formats.cache_clear()


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_photo_is_called_what_it_is(tmp_path, kind, without_heif):
    content, says = FILES[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for read in (load_reference, check_photo):
        with pytest.raises(UserError) as caught:
            read(path)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_heic_is_read_when_its_package_is_there(tmp_path, monkeypatch):
    class HeicFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (20, 16), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 20, 16), 72, ("RGB", 0, 1))]

    def register_heif_opener():
        Image.register_open("HEIF", HeicFile, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setitem(
        sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener)
    )
    monkeypatch.setattr(Image, "ID", Image.ID.copy())
    monkeypatch.setattr(Image, "OPEN", Image.OPEN.copy())
    photos._formats.cache_clear()
    try:
        pixels = np.asarray(noise(20, 16))
        (tmp_path / "a.jpg").write_bytes(
            box("heic", "mif1", "heic")[:72].ljust(72, b"\0") + pixels.tobytes()
        )
        np.testing.assert_array_equal(np.asarray(load_reference(tmp_path / "a.jpg")), pixels)
        (tmp_path / "b.heic").write_bytes(box("heix"))
        with pytest.raises(UserError, match="is a HEIC photo that pillow-heif cannot read"):
            load_reference(tmp_path / "b.heic")
    finally:
        photos._formats.cache_clear()


def test_heic_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)  # another test may have registered it
    photos._formats.cache_clear()
    try:
        (tmp_path / "a.jpg").write_bytes(box("heic", "mif1", "heic"))
        with pytest.raises(UserError, match="pip install pillow-heif to read it"):
            load_reference(tmp_path / "a.jpg")
    finally:
        photos._formats.cache_clear()


def test_heic_files_of_the_real_package_are_read(tmp_path):
    """Rows from blue to red, also under a name of JPEG, and cut off."""
    library = pytest.importorskip("pillow_heif")
    photos._formats.cache_clear()
    try:
        ramp = np.linspace(0, 255, 96).astype(np.uint8)
        pixels = np.stack([ramp, np.full_like(ramp, 40), ramp[::-1]], -1)[:, None].repeat(64, 1)
        library.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=95)
        (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
        for name in ("a.heic", "b.jpg"):
            got = np.asarray(load_reference(tmp_path / name)).astype(int)
            assert got.shape == pixels.shape
            assert np.abs(got - pixels).max() <= 12
            assert check_photo(tmp_path / name).note == ""
        content = (tmp_path / "a.heic").read_bytes()
        (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"cut\.heic") as caught:
            load_reference(tmp_path / "cut.heic")
        assert "\n" not in str(caught.value)
    finally:
        photos._formats.cache_clear()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_of_any_bits_in_words_of_16_keeps_its_brightness(tmp_path, bits):
    values = (RAMP.astype(np.uint16) * ((2**bits - 1) // 255)).astype(np.uint16)
    values[0, -1] = 2**bits - 1
    Image.fromarray(values).save(tmp_path / "a.tif")
    got = np.asarray(load_reference(tmp_path / "a.tif"))[..., 0].astype(int)
    assert np.abs(got - RAMP).max() <= 2
    note = check_photo(tmp_path / "a.tif").note
    assert (f"holds {bits} bits in 16-bit words" in note) == (bits < 16)


def test_floats_are_from_black_0_to_white_1_or_refused(tmp_path):
    for white, fits in (
        (1.0, True),
        (255.0, False),
        (4.0, False),
        (-1.0, False),
        (float("nan"), False),
    ):
        Image.fromarray((RAMP / 255 * white).astype(np.float32)).save(tmp_path / "a.tif")
        if fits:
            assert (
                np.abs(
                    np.asarray(load_reference(tmp_path / "a.tif"))[..., 0].astype(int) - RAMP
                ).max()
                <= 1
            )
            continue
        for read in (load_reference, check_photo):
            with pytest.raises(
                UserError, match=r"floats from .* to .*, where black is 0 and white is 1"
            ):
                read(tmp_path / "a.tif")


def test_grey_of_more_than_16_bits_is_refused_rather_than_white():
    with pytest.raises(ValueError, match="grey values from 0 to 70000, more than 16 bits"):
        on_white(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_a_photo_that_is_nearly_black_is_noted(tmp_path):
    Image.fromarray(np.repeat(RAMP[..., None] // 16, 3, -1)).save(tmp_path / "dark.png")
    noise(32, 16).save(tmp_path / "bright.jpg")
    Image.new("RGBA", (16, 16), (0, 0, 0, 255)).save(tmp_path / "black.png")
    assert "is nearly black (15 of 255)" in check_photo(tmp_path / "dark.png").note
    assert "is nearly black (0 of 255)" in check_photo(tmp_path / "black.png").note
    assert check_photo(tmp_path / "bright.jpg").note == ""


@pytest.mark.parametrize(
    ("size", "fits"), [((1, 1), False), ((15, 400), False), ((400, 15), False), ((16, 16), True)]
)
def test_a_photo_has_at_least_16_pixels_on_each_side(tmp_path, size, fits):
    noise(*size).save(tmp_path / "a.png")
    if fits:
        assert load_reference(tmp_path / "a.png").size == size
        return
    for read in (load_reference, check_photo):
        with pytest.raises(
            UserError,
            match=rf"a.png: is {size[0]} x {size[1]} pixels; use 16 x 16 or more",
        ):
            read(tmp_path / "a.png")


def test_a_damaged_photo_is_found_wherever_it_ends(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp", "a.tif", "a.gif"):
        noise(640, 480).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        assert len(check_photo(tmp_path / name).digest) == 64
        for share in (0.02, 0.5, 0.97):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            for read in (load_reference, check_photo):
                with pytest.raises(UserError, match=name):
                    read(tmp_path / name)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    noise(16, 16).save(tmp_path / "a.png")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    with pytest.raises(
        UserError,
        match=r"a.png: cannot be read \(Permission denied\); check the file and its permissions",
    ):
        load_reference(tmp_path / "a.png")


def test_a_photo_that_is_cut_off_is_found_without_decoding_whole_ones(tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch)
    for name in ("a.jpg", "a.png", "a.webp"):
        noise(640, 480).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        identify_photo(tmp_path / name)
        assert not decoded
        for share in (0.5, 0.97):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UserError, match=name):
                identify_photo(tmp_path / name)
        decoded.clear()
    noise(640, 480).save(tmp_path / "a.jpg")  # as a telephone stores a film after the photo
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"film \xff\xda")
    assert len(identify_photo(tmp_path / "a.jpg").digest) == 64


def test_without_decoding_only_damaged_pixels_are_missed(tmp_path, monkeypatch):
    noise(64, 48).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    decoded = count_decodes(monkeypatch)
    assert identify_photo(tmp_path / "a.png").digest == hashlib.sha256(whole).hexdigest()
    middle = len(whole) // 2
    (tmp_path / "a.png").write_bytes(whole[:middle] + bytes(50) + whole[middle + 50 :])
    identify_photo(tmp_path / "a.png")
    assert not decoded
    with pytest.raises(UserError, match=r"a.png: cannot be read"):
        decode_photo(tmp_path / "a.png")
    for content, says in FILES.values():
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match="a.png: ") as caught:
            identify_photo(tmp_path / "a.png")
        assert says.partition(";")[0].split(" photo")[0] in str(caught.value)


def test_a_decoded_photo_is_noted_as_a_checked_one(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 16).save(tmp_path / "grey.tif")
    Image.fromarray(np.repeat(RAMP[..., None] // 16, 3, -1)).save(tmp_path / "dark.png")
    noise(32, 16).save(tmp_path / "bright.png")
    for name in ("grey.tif", "dark.png", "bright.png"):
        found = decode_photo(tmp_path / name)
        assert found.note == check_photo(tmp_path / name).note
        assert bool(found.note) == (name != "bright.png")
        np.testing.assert_array_equal(
            np.asarray(found.image), np.asarray(load_reference(tmp_path / name))
        )
