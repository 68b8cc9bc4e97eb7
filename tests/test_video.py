"""A video survives the disk, a broken one is a user's mistake, and nothing half-written stays behind."""

import av
import numpy as np
import pytest

from jax_idgrpo.data import video
from jax_idgrpo.errors import UserError


def moving_clip(frames: int = 9, size: int = 64) -> np.ndarray:
    """A bright disc that crosses a coloured slope: content on which h264 can be judged."""
    y, x = np.mgrid[0:size, 0:size] / size
    slope = np.stack([x, y, 1 - x], -1)
    centres = np.linspace(0.2, 0.8, frames)
    disc = np.stack([np.exp(-((x - c) ** 2 + (y - 0.5) ** 2) / 0.02) for c in centres])[..., None]
    return (np.clip(slope[None] * 0.7 + disc, 0, 1) * 2 - 1).astype(np.float32)


def test_round_trip_keeps_frames_rate_and_content(tmp_path):
    clip = moving_clip()
    video.write_video(tmp_path / "new" / "clip.mp4", clip, fps=8)
    back = video.read_video(tmp_path / "new" / "clip.mp4")
    assert back.shape == clip.shape
    error = np.abs(back - clip).mean()
    assert error < 0.03
    assert np.abs(back - clip[::-1]).mean() > 2 * error, "the frames come back in another order"
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        assert container.streams.video[0].codec_context.name == "h264"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def turned(path, quarter_turns: int) -> None:
    """Have players turn a stored mp4, clockwise: the matrix of its track's header says so, in 16.16 fixed point."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns % 4]
    content[matrix : matrix + 20] = b"".join((value << 16).to_bytes(4, "big", signed=True) for value in (cos, sin, 0, -sin, cos))
    path.write_bytes(content)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_video_filmed_on_its_side_is_read_upright(tmp_path, quarter_turns):
    clip, path = moving_clip()[:, :48], tmp_path / "clip.mp4"
    lying = np.rot90(clip, quarter_turns, axes=(1, 2))
    video.write_video(path, lying, fps=8, quality=video.FINE)
    turned(path, quarter_turns)
    upright = video.read_video(path)
    assert upright.shape == clip.shape
    assert np.abs(upright - clip).mean() < 0.03
    assert np.abs(video.read_frames(path, 9, (48, 64), 8) - clip).mean() < 0.03


def test_bytes_round_trip_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(video.to_uint8(video.from_uint8(pixels)), pixels)
    assert video.to_uint8(np.float32([[-3.0, 3.0]])).tolist() == [[0, 255]]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    video.write_video(path, moving_clip(), fps=8)
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017 any error of the encoder: h264 takes no odd sizes in yuv420p
        video.write_video(path, moving_clip(size=63), fps=8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("content", [None, b"", b"not a video at all" * 50])
def test_broken_video_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        video.read_video(path)


def test_contact_sheet_is_rows_by_frames():
    clips = np.stack([moving_clip(), -moving_clip()])
    sheet = video.contact_sheet(clips, frames=3, scale=2)
    assert sheet.size == (3 * 64 * 2, 2 * 64 * 2)
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(pixels[:128:2, 256::2], video.to_uint8(clips[0, -1]))
