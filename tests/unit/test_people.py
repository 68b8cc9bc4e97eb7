"""Whole people: regions around faces by hand, and the properties of the comparison with photos."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jax_idgrpo.rewards import people
from jax_idgrpo.rewards.tracks import TrackConfig
from tests.helpers.people import SMALL, small_network

SIZE = (80, 120)  # height and width of the frames
FRAMES, FACES, PEOPLE, WIDTH = 3, 4, 3, 6


def regions(*boxes, size=SIZE):
    boxes = np.asarray(boxes, np.float32)
    shown = np.ones(len(boxes), bool)
    return np.asarray(people.regions(boxes, shown, np.asarray(size, np.float32)))


# ---- geometry ------------------------------------------------------------------------------------


def test_a_region_is_three_faces_wide_and_reaches_four_faces_below():
    (region,) = regions((50, 20, 60, 30))
    np.testing.assert_allclose(region, (40, 14, 70, 70))


def test_a_region_ends_at_the_border_of_the_picture():
    (region,) = regions((5, 2, 25, 32))
    np.testing.assert_allclose(region, (-0.5, -0.5, 45, 79.5))


def test_neighbours_part_halfway_between_their_faces():
    left, right = regions((40, 20, 50, 30), (56, 22, 66, 32))
    assert (left[0], left[2], right[0], right[2]) == (30, 53, 53, 76)


def test_people_who_do_not_overlap_keep_their_regions():
    left, right = regions((10, 20, 20, 30), (80, 22, 90, 32))
    assert (left[2], right[0]) == (30, 70)
    high, low = regions((50, 4, 52, 6), (53, 60, 57, 64))  # the region above ends before
    assert (high[2], low[0]) == (54, 49)


def test_a_region_holds_its_own_face_whatever_stands_before_it():
    behind, before = regions((40, 20, 50, 30), (43, 24, 53, 34))
    assert behind[2] == 50
    assert before[0] == 43


def test_padding_and_order_of_faces_change_no_region():
    boxes = np.asarray([(40, 20, 50, 30), (56, 22, 66, 32), (58, 40, 61, 43)], np.float32)
    order, size = np.array([2, 0, 1]), np.asarray(SIZE, np.float32)
    expected = regions(*boxes)
    np.testing.assert_array_equal(regions(*boxes[order]), expected[order])
    padded = people.regions(np.pad(boxes, ((1, 1), (0, 0))), np.arange(5) % 4 > 0, size)
    np.testing.assert_array_equal(padded[1:4], expected)


def test_a_photo_tells_how_much_of_the_person_is_compared():
    region, reach = people.photo_region(np.array([(30.0, 20.0, 50.0, 50.0)]), (94, 100))
    np.testing.assert_allclose(region, (10, 2, 70, 93.5))
    np.testing.assert_allclose(reach, (1, 0.6, 1, 1.45))


def test_a_photo_of_a_face_alone_tells_nothing_of_the_person():
    box = np.array([(2.0, 3.0, 42.0, 53.0)])
    assert people.photo_region(box, (59, 45)) is None
    assert people.photo_region(box, (61, 45)) is not None


@pytest.mark.parametrize("region", [(10, 5, 90, 200), (-0.5, -0.5, 40, 30.25), (60.5, 20, 63, 40)])
def test_photos_and_frames_are_resized_alike(region):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (210, 100, 3), np.uint8)
    region = np.asarray(region, np.float32)
    photo = people.photo_picture(Image.fromarray(pixels), region, 24)
    frame = pixels.astype(np.float32) / 127.5 - 1
    video = people.resized(jnp.asarray(frame), jnp.asarray(region), 24)
    np.testing.assert_allclose(video, photo, atol=1.01 / 127.5)  # the photo is rounded twice


# ---- terms ---------------------------------------------------------------------------------------


@functools.cache
def program():
    graph, state = nnx.split(small_network())

    @jax.jit
    def run(given):
        network = nnx.merge(graph, state)
        return people.person_terms(network, *given, 0.15, TrackConfig())

    return run


def terms(case):
    reference = people.ReferencePeople(case["features"], case["reach"], case["counts"])
    names = ("videos", "boxes", "embeddings", "face_mask", "references", "reference_mask")
    found = jax.device_get(program()((*(case[name] for name in names), reference)))
    return found["person_similarity"], found["person_similarity_min"]


def describe(picture, region):
    pictures = people.resized(jnp.asarray(picture), jnp.asarray(region), SMALL.image_size)
    return np.asarray(people.describe(small_network(), pictures[None]))[0]


def make_case(rows=2, noise=0.0):
    """Rows of three people who stand still in noise; the photo is the first frame of their video.

    In the fourth slot of the faces is padding.
    """
    rng = np.random.default_rng(3)
    videos = np.repeat(rng.uniform(-1, 1, (rows, 1, *SIZE, 3)), FRAMES, 1)
    videos = (videos + noise * rng.normal(size=videos.shape)).astype(np.float32)
    left = np.array([15, 50, 90, 0]) + rng.uniform(-3, 3, (rows, 1, FACES))
    top = 10 + rng.uniform(0, 5, (rows, 1, FACES))
    boxes = np.stack([left, top, left + 10, top + 12], -1)
    boxes = np.repeat(boxes, FRAMES, 1).astype(np.float32)
    names = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:FACES]
    mask = np.ones((rows, FRAMES, FACES), bool)
    mask[:, :, 3] = False
    size = np.asarray(SIZE, np.float32)
    photo = np.asarray(people.regions(boxes[:, 0], mask[:, 0], size))[:, :PEOPLE]
    reach = np.asarray(people.reach_of(photo, boxes[:, 0, :PEOPLE]))
    features = np.stack(
        [[describe(v[0], r) for r in p] for v, p in zip(videos, photo, strict=True)]
    )
    return {
        "videos": videos,
        "boxes": boxes,
        "embeddings": np.broadcast_to(names, (rows, FRAMES, FACES, WIDTH)).astype(np.float32),
        "face_mask": mask,
        "references": np.broadcast_to(names[:PEOPLE], (rows, PEOPLE, WIDTH)).astype(np.float32),
        "reference_mask": np.ones((rows, PEOPLE), bool),
        "features": features.astype(np.float32),
        "reach": reach.astype(np.float32),
        "counts": np.ones((rows, PEOPLE), bool),
    }


CASE = functools.cache(make_case)
OF_PEOPLE = ("references", "reference_mask", "features", "reach", "counts")
OF_FACES = ("boxes", "embeddings", "face_mask")


def edited(case, **changes):
    """A copy of the case in which functions have changed arrays in place."""
    case = {name: value.copy() for name, value in case.items()}
    for name, change in changes.items():
        change(case[name])
    return case


def set_to(index, value):
    def change(array):
        array[index] = value

    return change


def test_the_photo_itself_is_alike_and_a_video_without_anybody_is_not():
    mean, least = terms(CASE())
    np.testing.assert_allclose(mean, 1, atol=1e-5)
    np.testing.assert_allclose(least, 1, atol=1e-5)
    nobody = terms(edited(CASE(), face_mask=set_to(..., False)))
    np.testing.assert_array_equal(nobody, 0)


def test_a_frame_without_the_person_counts_nothing():
    mean, least = terms(edited(CASE(), face_mask=set_to((0, 1, 2), False)))
    np.testing.assert_allclose(mean, (1 - 1 / 9, 1), atol=1e-5)
    np.testing.assert_allclose(least, (2 / 3, 1), atol=1e-5)


def test_other_clothes_are_less_alike_also_under_the_same_face():
    other = make_case(noise=1.0)
    mean, least = terms(other | {"features": CASE()["features"]})
    assert (mean < 0.99).all()
    assert (least < mean).all()


def test_order_of_people_faces_and_rows_changes_nothing():
    case = edited(CASE(noise=0.5), face_mask=set_to((0, 1, 2), False))
    case["features"] = CASE()["features"]
    base = terms(case)
    p, k = np.array([2, 0, 1]), np.array([1, 3, 0, 2])
    shuffled = case | {name: case[name][:, p] for name in OF_PEOPLE}
    shuffled |= {name: case[name][:, :, k] for name in OF_FACES}
    np.testing.assert_allclose(terms(shuffled), base, atol=1e-6)
    turned = {name: value[::-1].copy() for name, value in case.items()}
    np.testing.assert_allclose(np.flip(terms(turned), 1), base, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours():
    case = CASE(noise=0.5) | {"features": CASE()["features"]}
    base = np.asarray(terms(case))
    empty = edited(
        case,
        face_mask=set_to(1, False),
        videos=set_to(1, 0.5),
        reference_mask=set_to((1, 1), False),
    )
    np.testing.assert_allclose(np.asarray(terms(empty))[:, 0], base[:, 0], atol=1e-6)


def test_padding_changes_nothing():
    case = CASE(noise=0.5) | {"features": CASE()["features"]}
    two = edited(case, reference_mask=set_to((slice(None), 2), False))
    padded = edited(
        two,
        references=set_to((slice(None), 2), 0),
        features=set_to((slice(None), 2), 0),
        reach=set_to((slice(None), 2), 0),
        counts=set_to((slice(None), 2), False),
        boxes=set_to((slice(None), slice(None), 3), (40, 10, 60, 30)),
    )
    np.testing.assert_allclose(terms(padded), terms(two), atol=1e-6)


def test_a_photo_of_a_face_alone_leaves_the_person_out():
    case = edited(CASE(), face_mask=set_to((0, slice(None), 2), False))
    np.testing.assert_allclose(terms(case)[0], (2 / 3, 1), atol=1e-5)
    left_out = edited(case, counts=set_to((0, 2), False))
    np.testing.assert_allclose(terms(left_out), 1, atol=1e-5)
    np.testing.assert_array_equal(terms(edited(case, counts=set_to(..., False))), 0)


def test_what_the_photo_does_not_show_is_not_compared():
    short = edited(CASE(), reach=set_to((..., 3), 0.5))
    other = edited(short, videos=set_to((slice(None), slice(None), slice(40, None)), 1.0))
    np.testing.assert_allclose(terms(other), terms(short), atol=1e-6)
    assert np.all(np.abs(np.subtract(terms(short), terms(CASE()))) > 1e-4)


def test_a_person_is_followed_where_the_face_is_exchanged():
    """In one frame two people have each other's face; their clothes stay, and so does the term."""
    exchanged = edited(
        CASE(), embeddings=set_to((slice(None), 1, [0, 1]), CASE()["embeddings"][:, 1, [1, 0]])
    )
    np.testing.assert_allclose(terms(exchanged), 1, atol=1e-5)
