"""Films: cuts to the frame, filters by cheap measures, identities without chains, photos of another clip."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.errors import UserError
from jax_idgrpo.ingest import command, faces, films, frames, identities

SETTINGS = films.Settings(frames.Limits(), faces.FaceLimits())


def test_hard_cuts_are_found_to_the_frame():
    change = np.full(200, 3.0)
    change[[40, 90, 150]] = 60, 30, 20
    assert frames.find_cuts(change.tolist()) == [40, 90, 150]


def test_a_moderate_change_is_a_cut_only_where_its_neighbours_are_calm():
    change = np.full(100, 3.0)
    change[30] = 16
    change[58:64] = 14
    change[61] = 16
    assert frames.find_cuts(change.tolist()) == [30]


def test_of_two_cuts_close_together_the_stronger_counts():
    change = np.full(100, 3.0)
    change[50], change[56] = 30, 80
    assert frames.find_cuts(change.tolist()) == [56]


def test_hue_is_a_circle():
    red, other = np.zeros((4, 4, 3), np.int16), np.zeros((4, 4, 3), np.int16)
    red[..., 0], other[..., 0] = 254, 2
    assert frames._hsv_change(red, other) == pytest.approx(4 / 3)


COLOURS = ((1.0, 0.5, 0.2), (0.2, 1.0, 0.5), (0.5, 0.2, 1.0))


def film(shots, length=48, side=64):
    """Statistics of shots of a moving pattern; a shot is (offset, gain, speed in pixels)."""
    found = frames.Statistics()
    for shot, (offset, gain, speed) in enumerate(shots):
        for number in range(length):
            wave = 128 + 120 * np.sin(2 * np.pi * (np.arange(side) + speed * number) / 16)
            coloured = wave[None, :, None] * np.asarray(COLOURS[shot % 3])
            picture = np.broadcast_to(offset + gain * coloured, (side, side, 3))
            found.add(np.clip(picture, 0, 255).astype(np.uint8))
    return found


def test_dark_bright_flat_and_still_shots_are_left_out_with_their_reason():
    shots = [(0, 1, 1), (0, 0.02, 1), (225, 0.2, 1), (100, 0, 1), (0, 1, 0)]
    found = frames.spans(film(shots), 24.0, frames.Limits(seconds=(1.0, 20.0), motion=(0.002, 2.0)))
    assert [span.reason for span in found] == ["", "dark", "bright", "blurred", "still"]
    assert (found[0].start, found[0].end) == (0, 46)  # without the margin at the cut
    assert (found[1].start, found[1].end) == (50, 94)


def test_long_scenes_are_divided_and_short_ones_left_out():
    found = frames.spans(
        film([(0, 1, 1)], length=100), 10.0, frames.Limits(seconds=(1.0, 3.0), motion=(0.0, 2.0))
    )
    assert [(span.start, span.end) for span in found] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    short = frames.spans(film([(0, 1, 1)], length=15), 10.0, frames.Limits())
    assert [span.reason for span in short] == ["short"]


def test_black_borders_are_found():
    statistics = frames.Statistics()
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[8:56, 5:90] = 128
    statistics.add(picture)
    assert statistics.borders() == (8, 56, 5, 89)  # of even size
    statistics.add(np.zeros_like(picture))
    assert statistics.borders() == (8, 56, 5, 89)


def unit(values):
    values = np.asarray(values, float)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_an_exchange_is_seen_wherever_it_happens_and_one_bad_face_is_not_one():
    rng = np.random.default_rng(0)
    a, b = unit(rng.normal(size=(2, 64)))
    noise = 0.3 / 8 * rng.normal(size=(20, 64))
    for place in range(2, 19):
        track = unit(np.where(np.arange(20)[:, None] < place, a, b) + noise)
        assert faces.least_split(track) < 0.5
    steady = unit(a + noise)
    steady[7] = b
    assert faces.least_split(steady) > 0.8


def test_a_chain_of_likenesses_does_not_join_strangers():
    angles = np.radians([0, 40, 80, 120, 160])
    chain = np.stack([np.cos(angles), np.sin(angles)], -1)
    found = identities.group(chain, 0.55)
    assert found[0] != found[-1]
    assert len(set(found.tolist())) >= 3
    people = np.random.default_rng(1).normal(size=(4, 128))
    copies = unit(people.repeat(5, 0) + 0.4 * np.random.default_rng(2).normal(size=(20, 128)))
    assert identities.group(copies, 0.55).tolist() == np.arange(4).repeat(5).tolist()


def test_photos_come_from_another_clip_where_there_is_one():
    def photo(clip, quality, yaw=0.0):
        return identities.Candidate(clip, f"{clip}-{quality}-{yaw}.png", quality, yaw)

    listed = [photo(0, 9.0), photo(1, 1.0), photo(1, 2.0, 30.0), photo(2, 1.5, -30.0)]
    best, more = identities.choose_photos(listed, clip=0)
    assert best == listed[2]
    assert {other.clip for other in more} == {1, 2}
    best, more = identities.choose_photos(listed[:1], clip=0)
    assert (best, more) == (listed[0], ())


def test_chosen_shots_are_good_and_differ_in_yaw():
    shots = [faces.Shot(b"", 1.0 - 0.001 * n, 0.1 * n) for n in range(10)]
    shots.append(faces.Shot(b"", 0.9, 40.0))
    chosen = faces.choose_shots(shots, 2)
    assert [shot.yaw for shot in chosen] == [0.0, 40.0]


def test_yaw_is_zero_in_front_and_signed():
    front = np.array([[10.0, 10], [30, 10], [20, 20], [12, 30], [28, 30]])
    turned = front.copy()
    turned[2, 0] = 25
    assert faces.yaw(front) == 0
    assert faces.yaw(turned) > 10
    assert faces.yaw(turned * 3) == pytest.approx(faces.yaw(turned))


def test_a_photo_has_the_face_in_its_middle_third_also_at_the_edge():
    frame = np.zeros((100, 160, 3), np.uint8)
    for box in ([70, 40, 90, 62], [0, 0, 20, 22]):
        png = faces.cut_photo(frame, np.asarray(box, float))
        picture = Image.open(io.BytesIO(png))
        assert picture.width == picture.height
        assert picture.width == pytest.approx(2.2 * 22, abs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": frames.Limits(seconds=(5.0, 2.0))}, "--seconds 5.0 2.0"),
        ({"limits": frames.Limits(stalled=2.0)}, "--stalled"),
        ({"faces": faces.FaceLimits(people=(0, 2))}, "begin above 0"),
        ({"faces": faces.FaceLimits(people=(3, 2))}, "--people 3 2"),
    ],
)
def test_bad_options_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        command.check_settings(dataclasses.replace(SETTINGS, **change), 0.55)
    with pytest.raises(UserError, match="--same"):
        command.check_settings(SETTINGS, 2.0)


def test_captions_are_read_by_film_or_clip(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("video,prompt\nfilm.mp4,A walk.\nother,\n")
    assert command.read_captions(path) == {"film.mp4": "A walk."}
    path.write_text("video,prompt\nfilm.mp4,\n")
    with pytest.raises(UserError, match="no row has a video"):
        command.read_captions(path)
