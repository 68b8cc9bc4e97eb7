"""Control videos and masks: the columns of the CSV, what is read, and what is refused."""

import av
import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.data.controls import read_control
from jax_idgrpo.data.prompts import load_prompts, row_digests
from jax_idgrpo.data.video import FINE, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling.conditioning import mask_channels, refuse_controls

SIZE, FRAMES, FPS = (32, 48), 9, 8


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    half = np.zeros((*SIZE, 3), np.uint8)
    half[:, :24] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    for name, frames in (("five.mp4", 5), ("nine.mp4", FRAMES)):
        shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 25
        write_video(tmp_path / name, np.broadcast_to(shades, (frames, *SIZE, 3)), FPS, FINE)
    return tmp_path


def write_sound(path):
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def prompts(folder, *rows):
    (folder / "p.csv").write_text("\n".join(["ref_paths,prompt,control,mask", *rows]) + "\n")
    return load_prompts(folder / "p.csv", 2)


def test_columns_are_optional_and_part_of_a_row(folder):
    rows = prompts(
        folder, "a.png,One.,,", "a.png,One.,nine.mp4,", "a.png,One.,nine.mp4,half.png",
        "a.png,One.,five.mp4,",
    )  # fmt: skip
    assert [row.control and row.control.name for row in rows] == [
        None,
        "nine.mp4",
        "nine.mp4",
        "five.mp4",
    ]
    assert len(set(row_digests(rows))) == 4
    (folder / "q.csv").write_text("ref_paths,prompt\na.png,One.\n")
    assert row_digests(load_prompts(folder / "q.csv", 2)) == row_digests(rows[:1])


def test_a_short_video_holds_its_last_frame(folder):
    video, mask = read_control(folder / "five.mp4", folder / "half.png", FRAMES, SIZE, FPS)
    assert video.shape == (FRAMES, *SIZE, 3)
    np.testing.assert_array_equal(video[5:], np.broadcast_to(video[4], video[5:].shape))
    assert video[4].mean() > video[3].mean()
    assert mask[:, :, :20].min() == 1
    assert mask[:, :, 28:].max() == 0
    np.testing.assert_array_equal(
        read_control(folder / "nine.mp4", None, FRAMES, SIZE, FPS)[1], np.ones((FRAMES, *SIZE))
    )


def test_pixels_of_a_cell_become_its_channels():
    mask = np.random.default_rng(0).random((5, 16, 24)).astype(np.float32)
    cells = mask_channels(mask, 2)
    assert cells.shape == (2, 2, 3, 64)
    np.testing.assert_array_equal(cells[0, 1, 2], mask[1, 8:16, 16:24].ravel())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.png,One.,none.mp4,", "line 2: control .*none.mp4: no such file; control is relative"),
        ("a.png,One.,nine.mp4,none.png", "line 2: mask .*none.png: no such file"),
        ("a.png,One.,,half.png", "line 2: mask without control"),
        ("a.png,One.,nine.mp4,five.mp4", "line 2: mask .* has 5 frames and its control video 9"),
        ("a.png,One.,sound.mp4,", "line 2: control: .*sound.mp4"),
        ("a.png,One.,a.png,", "line 2: control: .*a.png"),
        ("a.png,One.,text.mp4,", "line 2: control: .*text.mp4"),
    ],
)
def test_files_that_are_no_control_are_refused_in_one_line(folder, row, reason):
    (folder / "text.mp4").write_text("no video")
    write_sound(folder / "sound.mp4")
    with pytest.raises(UserError, match=reason) as error:
        prompts(folder, row)
    assert "\n" not in str(error.value)


def test_other_kinds_refuse_controls_by_line(folder):
    rows = prompts(folder, "a.png,One.,,", "a.png,One.,nine.mp4,")
    refuse_controls(rows, "vace")
    with pytest.raises(
        UserError, match="line 3: control is an input of VACE, and model.kind is ph"
    ):
        refuse_controls(rows, "phantom")
