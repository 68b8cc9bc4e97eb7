"""A video survives the disk, a broken one is a user's mistake, and nothing half-written stays behind."""

from fractions import Fraction

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
    content[matrix : matrix + 20] = b"".join(
        (value << 16).to_bytes(4, "big", signed=True) for value in (cos, sin, 0, -sin, cos)
    )
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
    with pytest.raises(av.FFmpegError):  # h264 takes no odd sizes in yuv420p
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


def coded(path, clip, *, options=None, aspect=None, times=None, codec="libx264") -> None:
    """Write a clip as other programs do: with an aspect of its pixels, or frames at times in milliseconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(video.to_uint8(clip)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("aspect", "stored"), [(Fraction(2), (64, 32)), (Fraction(1, 2), (32, 64))]
)
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, stored):
    clip = moving_clip()
    rows, columns = 64 // stored[0], 64 // stored[1]
    squeezed = clip.reshape(9, stored[0], rows, stored[1], columns, 3).mean((2, 4))
    coded(tmp_path / "clip.mp4", squeezed, aspect=aspect)
    found = video.read_video(tmp_path / "clip.mp4")
    assert found.shape == clip.shape
    assert np.abs(found - clip).mean() < 0.05
    opened = video.Clip.open(tmp_path / "clip.mp4")
    assert (opened.height, opened.width) == (64, 64)


def test_frames_of_a_variable_rate_are_those_of_even_times(tmp_path):
    clip = moving_clip()
    coded(tmp_path / "clip.mkv", clip, times=[0, 20, 40, 300, 900, 1500, 1540, 1580, 1600])
    shown = [0, 2, 3, 3, 3, 4, 4, 4, 8]
    assert video.Clip.open(tmp_path / "clip.mkv").numbers == tuple(shown)
    assert np.abs(video.read_video(tmp_path / "clip.mkv") - clip[shown]).mean() < 0.04


def test_times_that_are_even_up_to_rounding_change_nothing():
    assert video.constant_rate([0.0, 0.13, 0.25, 0.38, 0.5]) == [0, 1, 2, 3, 4]
    assert (
        video.constant_rate([None, None, None]) == video.constant_rate([0.0, 0.0, 0.0]) == [0, 1, 2]
    )
    assert video.constant_rate([]) == []
    assert video.constant_rate([3.0]) == [0]


def test_a_clip_is_read_in_blocks_as_it_is_read_whole(tmp_path):
    video.write_video(tmp_path / "clip.mp4", moving_clip(), fps=8)
    clip, whole = video.Clip.open(tmp_path / "clip.mp4"), video.read_video(tmp_path / "clip.mp4")
    blocks = list(clip.blocks(4))
    assert [len(block) for block in blocks] == [4, 4, 1]
    np.testing.assert_array_equal(video.from_uint8(np.concatenate(blocks)), whole)
    np.testing.assert_array_equal(clip.read([0, 4, 8]), whole[[0, 4, 8]])


def test_a_video_that_cannot_be_read_says_why(tmp_path):
    path = tmp_path / "clip.mp4"
    coded(path, moving_clip())
    whole = path.read_bytes()
    coded(path, moving_clip(), options={"movflags": "faststart"})
    front = path.read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for content, reason in (
        (b"", "is empty"),
        (b"not a video at all" * 50, "is no video of a kind that is read"),
        (whole[: len(whole) // 2], "is damaged or cut off"),
        (front[: len(front) * 2 // 3], "is damaged or cut off"),
        ((tmp_path / "sound.mp4").read_bytes(), "holds no video"),
    ):
        path.write_bytes(content)
        for read in (
            video.read_video,
            video.Clip.open,
            lambda path: video.read_frames(path, 99, (64, 64), 8),
        ):
            with pytest.raises(UserError, match=rf"clip\.mp4: {reason}"):
                read(path)


def test_a_video_that_is_not_finite_is_not_written(tmp_path):
    clip = moving_clip()
    clip[3, 0, 0] = np.nan
    with pytest.warns(UserWarning, match=r"clip\.mp4: is not finite"):
        video.write_video(tmp_path / "clip.mp4", clip, fps=8)
    assert not list(tmp_path.iterdir())


def test_videos_of_a_folder(tmp_path):
    for name in ("b.MP4", "a.webm", "._b.MP4", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "more.mp4").mkdir()
    videos, others = video.list_videos(tmp_path)
    assert [path.name for path in videos] == ["a.webm", "b.MP4"]
    assert [path.name for path in others] == ["notes.txt"]


def test_contact_sheet_is_rows_by_frames():
    clips = np.stack([moving_clip(), -moving_clip()])
    sheet = video.contact_sheet(clips, frames=3, scale=2)
    assert sheet.size == (3 * 64 * 2, 2 * 64 * 2)
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(pixels[:128:2, 256::2], video.to_uint8(clips[0, -1]))
