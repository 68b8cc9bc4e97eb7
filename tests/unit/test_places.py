"""Places of people: the column of the CSV, its drawing, the term `placed`, and where it counts."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import Config, DataConfig, EvaluateConfig, GrpoConfig, RewardConfig
from jax_idgrpo.data.places import COLOURS, Places, draw_places
from jax_idgrpo.data.prompts import load_prompts, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap, commands, journal, report
from jax_idgrpo.evaluation.sampler import all_rows
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.matching import Matches
from jax_idgrpo.rewards.placed import PlaceTargets, placed, require_places
from jax_idgrpo.sampling.conditioning import refuse_controls
from jax_idgrpo.training.selection import choose, mean_of_numbers, select_pairs
from tests.helpers import identity_cases

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
DOMINANCE = dict(objective="dpo", pairs="dominance", best=1, worst=1, kl_units="velocity")
TWO = Places(boxes=((LEFT, LEFT), (RIGHT, RIGHT)))


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def prompts(folder, *rows, header="ref_paths,prompt,places"):
    (folder / "p.csv").write_text("\n".join([header, *rows]) + "\n")
    return load_prompts(folder / "p.csv", 3)


# ---- the column ----------------------------------------------------------------------------------


def test_boxes_moves_and_orders_are_read(folder):
    rows = prompts(
        folder,
        "a.png,One.,",
        "a.png,One.,0 0 .5 1",
        "a.png;b.png,Two.,0 0 0.5 1 ; 0.5 0 1 1 > 0 0 0.5 1",
        "a.png;b.png,Two.,Right;left",
        "a.png;b.png;c.png,Three.,2;1;3",
    )
    assert [row.places for row in rows] == [
        Places(),
        Places(boxes=((LEFT, LEFT),)),
        Places(boxes=((LEFT, LEFT), (RIGHT, LEFT))),
        Places(order=(2, 1)),
        Places(order=(2, 1, 3)),
    ]


def test_places_are_part_of_a_row_and_an_empty_cell_is_no_column(folder):
    rows = prompts(
        folder, "a.png,One.,", "a.png,One.,0 0 .5 1", "a.png,One.,0 0 .5 1 > 0 0 1 1",
        "a.png,One.,0.0 0.0 0.50 1.0",
    )  # fmt: skip
    digests = row_digests(rows)
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]
    (plain,) = prompts(folder, "a.png,One.", header="ref_paths,prompt")
    assert plain.places is None
    assert row_digests([plain]) == digests[:1]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("0 0 x 1", "of person 1: '0 0 x 1' is no box; write four numbers"),
        ("0 0 nan 1", "'0 0 nan 1' is no box"),
        ("0 0 1", "'0 0 1' is no box"),
        ("0 0 1.2 1", "'0 0 1.2 1' leaves the picture"),
        ("-0.1 0 1 1", "leaves the picture"),
        ("0 0 320 240", "leaves the picture; .* not pixels"),
        ("0.6 0 0.4 1", "is reversed or empty"),
        ("0 0.5 1 0.5", "is reversed or empty"),
        ("0 0 1 1; 0 0 1 1", "places has 2 entries and ref_paths 1 people"),
        ("0 0 1 1 > 0 0 1 1 > 0 0 1 1", "has 3 boxes; use one, or two"),
        ("left", "'left' is no order of 1 people; .* a box for one"),
    ],
)
def test_cells_that_are_no_places_are_refused_in_one_line(folder, cell, reason):
    with pytest.raises(UserError, match=f"line 2: .*{reason}") as error:
        prompts(folder, f"a.png,One.,{cell}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cell", ["left;left", "1;1", "0;1", "2;3", "1;left"])
def test_ranks_that_are_no_order_are_refused(folder, cell):
    with pytest.raises(UserError, match="line 2: places .* is no order of 2 people"):
        prompts(folder, f"a.png;b.png,Two.,{cell}")


def test_a_box_of_one_person_is_named_by_the_person(folder):
    with pytest.raises(UserError, match="line 2: places of person 2: '1 0 0 1' is reversed"):
        prompts(folder, "a.png;b.png,Two.,0 0 1 1;1 0 0 1")


def test_places_and_a_control_video_are_refused_in_one_row(folder):
    row, header = "a.png,One.,poses.mp4,0 0 1 1", "ref_paths,prompt,control,places"
    with pytest.raises(UserError, match="line 2: control and places in one row"):
        prompts(folder, row, header=header)


def test_other_kinds_refuse_places_by_line(folder):
    rows = prompts(folder, "a.png,One.,", "a.png,One.,0 0 1 1")
    refuse_controls(rows, "vace")
    refuse_controls(rows[:1], "phantom")
    with pytest.raises(UserError, match="line 3: places is an input of VACE, and model.kind is ph"):
        refuse_controls(rows, "phantom")


# ---- the drawing ---------------------------------------------------------------------------------


def test_outlines_are_two_pixels_wide_on_white_in_the_colour_of_the_person():
    box = (0.25, 0.125, 0.75, 0.875)
    (picture,) = draw_places(Places(boxes=((box, box),)), 1, (32, 40), coloured=True)
    expected = np.full((32, 40, 3), 255)
    expected[4:28, 10:30] = COLOURS[0]
    expected[6:26, 12:28] = 255
    np.testing.assert_array_equal(np.rint((picture + 1) * 127.5), expected)


def test_people_have_colours_of_their_own_or_are_black():
    first, second = (draw_places(TWO, 1, (16, 32), coloured) for coloured in (True, False))
    assert len(set(COLOURS)) == len(COLOURS) == 8
    for person, x in enumerate((0, 31)):
        np.testing.assert_array_equal(np.rint((first[0, 8, x] + 1) * 127.5), COLOURS[person])
    np.testing.assert_array_equal(second[0, 8, [0, 15, 16, 31]], -1)
    assert set(np.unique(second)) == {-1, 1}


def test_a_box_moves_linearly_and_stays_in_the_picture():
    start, end = (0.0, 0.0, 0.25, 1.0), (0.75, 0.0, 1.0, 1.0)
    video = draw_places(Places(boxes=((start, end),)), 7, (16, 32), coloured=False)
    left = [int(np.argmax((frame < 0).any((0, 2)))) for frame in video]
    assert left == [0, 4, 8, 12, 16, 20, 24]
    assert video[-1, 8, 31].max() == -1


def test_a_box_smaller_than_its_outline_is_filled():
    box = (0.999, 0.999, 1.0, 1.0)
    video = draw_places(Places(boxes=((box, box),)), 1, (16, 32), coloured=False)
    assert (video < 0).all(-1).sum() == 1


# ---- the term ------------------------------------------------------------------------------------

SIZE = (100, 200)
"""Height and width of the frames."""


def term(places, centres, missing=(), people=None):
    """Compute the term of one video whose person m has a face with centre (x, y) at `centres[t][m]`.

    Faces are in the reverse order of people. `missing` lists pairs of frame and person.
    """
    centres = np.asarray(centres, np.float32)
    frames, count, _ = centres.shape
    people = people or count
    boxes = np.concatenate([centres - 5, centres + 5], -1)[None, :, ::-1]
    face = np.full((1, frames, people), count)
    face[0, :, :count] = np.arange(count)[::-1]
    for frame, person in missing:
        face[0, frame, person] = count
    matches = Matches(face=face, matched=face < count, similarity=np.zeros(face.shape, np.float32))
    mask = (np.arange(people) < count)[None]
    targets = PlaceTargets.make([places], people)
    return float(placed(matches, boxes, mask, SIZE, targets)[0])


def test_placed_is_the_share_of_people_and_frames_in_their_boxes():
    right = [[(50, 50), (150, 50)]] * 4
    assert term(TWO, right) == 1
    assert term(TWO, [frame[::-1] for frame in right]) == 0
    assert term(TWO, [[(50, 50), (50, 50)]] * 4) == 0.5
    assert term(TWO, right, missing=[(0, 0)]) == pytest.approx(7 / 8)
    assert term(TWO, right, missing=[(t, m) for t in range(4) for m in range(2)]) == 0
    assert term(TWO, right, people=4) == 1  # padding counts nowhere


def test_placed_follows_a_box_that_moves():
    moving = Places(boxes=(((0.0, 0.0, 0.2, 1.0), (0.8, 0.0, 1.0, 1.0)),))
    assert term(moving, [[(20, 50)], [(100, 50)], [(180, 50)]]) == 1
    assert term(moving, [[(20, 50)]] * 3) == pytest.approx(1 / 3)


def test_order_is_kendalls_agreement_of_mean_centres():
    def inversions(order):
        return sum(a > b for a, b in itertools.combinations(order, 2))

    for order in itertools.permutations((1, 2, 3)):
        x = [(60 * rank, 50) for rank in order]
        assert term(Places(order=order), [x] * 2) == 1
        want = term(Places(order=(1, 2, 3)), [x] * 2)
        assert want == pytest.approx(1 - inversions(order) / 3), order
    swaying = [[(20, 50), (120, 50)], [(90, 50), (80, 50)]]  # means 55 and 100
    assert term(Places(order=(1, 2)), swaying) == 1
    assert term(Places(order=(1, 2)), [[(50, 50), (50, 50)]]) == 0.5
    three = [[(10, 50), (60, 50), (120, 50)]] * 2
    assert term(Places(order=(1, 2, 3)), three, missing=[(0, 2), (1, 2)]) == pytest.approx(1 / 3)


def test_rows_without_places_are_no_number_and_rows_are_independent():
    case = identity_cases.case(batch=4)
    case["reference_mask"][:] = True
    rows = [
        Places(),
        Places(boxes=(((0.0, 0.0, 0.4, 1.0),) * 2,) * 3),
        Places(order=(3, 1, 2)),
        Places(),
    ]
    targets = PlaceTargets.make(rows, 3)
    together = identity_cases.terms(case | {"places": targets})
    without = identity_cases.terms(case)
    assert set(together) - set(without) == {"placed"}
    for name, values in without.items():
        np.testing.assert_array_equal(together[name], values, err_msg=name)
    got = np.asarray(together["placed"])
    assert np.isnan(got).tolist() == [True, False, False, True]
    assert 0 < got[1] < 1
    other = [rows[1], rows[1], rows[2], rows[2]]
    again = identity_cases.terms(case | {"places": PlaceTargets.make(other, 3)})["placed"]
    np.testing.assert_array_equal(again[1:3], got[1:3])


def test_any_part_of_a_csv_with_the_column_has_places(folder):
    rows = prompts(folder, "a.png,One.,", "a.png;b.png,Two.,left;right")
    assert References.of_prompts(rows[:1], 2).places == (Places(),)
    assert References.of_prompts(rows, 2).places == (Places(), Places(order=(1, 2)))
    (plain,) = prompts(folder, "a.png,One.", header="ref_paths,prompt")
    assert References.of_prompts([plain], 2).places == ()


# ---- the reward ----------------------------------------------------------------------------------


def test_mixtures_leave_rows_without_places_out():
    rewards = np.array([[0.1, 0.2], [0.4, 0.1], [0.3, 0.5]], np.float32)
    terms = {"placed": np.array([[1.0, 0.0], [np.nan, np.nan], [0.5, 0.5]], np.float32)}
    for config in (GrpoConfig(), GrpoConfig(global_std=True)):
        alone, _, _ = choose(config, rewards, terms, {})
        mixed, weight, _ = choose(config, rewards, terms, {"placed": 2.0})
        np.testing.assert_array_equal(mixed[1:], alone[1:])
        assert mixed[0, 0] > 0 > alone[0, 0]
        assert weight.all()
        absent = {"placed": np.full_like(rewards, np.nan)}
        np.testing.assert_array_equal(choose(config, rewards, absent, {"placed": 2.0})[0], alone)
    assert mean_of_numbers(terms["placed"].ravel()) == 0.5


def test_pairs_of_rows_without_places_are_chosen_by_the_other_terms():
    config = GrpoConfig(**DOMINANCE, pair_terms={"reward": 1, "placed": 1})
    rewards = np.array([[0.1, 0.2], [0.4, 0.1]], np.float32)
    terms = {"placed": np.array([[1.0, 0.0], [np.nan, np.nan]], np.float32)}
    members, usable, _ = select_pairs(config, rewards, terms)
    assert usable.tolist() == [False, True]
    assert members[1].tolist() == [0, 1]


def test_placed_is_refused_as_the_only_reward_and_without_places(folder):
    with pytest.raises(UserError, match="reward.mixture placed cannot be the only reward"):
        RewardConfig(mixture={"reward": 0, "placed": 1})
    RewardConfig(mixture={"reward": 0, "motion": 1, "placed": 1})
    with pytest.raises(UserError, match="grpo.pair_terms placed cannot be the only term"):
        GrpoConfig(**DOMINANCE, pair_terms={"placed": 1})
    rows = prompts(folder, "a.png,One.,", "a.png;b.png,Two.,left;right")
    require_places({"reward.mixture": {"placed": 1}}, rows)
    require_places({"reward.mixture": {"motion": 1}}, rows[:1])
    with pytest.raises(UserError, match="reward.mixture placed: no row of data.prompts has places"):
        require_places({"reward.mixture": {"placed": 1}}, rows[:1])


# ---- the evaluation ------------------------------------------------------------------------------


def test_videos_without_places_are_left_out_of_means_and_lines():
    values = np.array([1.0, 0.5, np.nan, np.nan, 0.0, 0.5])
    clusters = np.repeat(np.arange(3), 2)
    scores = {"base": {"placed": values}, "tuned": {"placed": values + 0.25}}
    means, changes = bootstrap.summarise(scores, clusters, 0, 50)
    assert means["base"]["placed"].mean == 0.5
    assert changes["tuned"]["placed"].mean == 0.25
    assert bootstrap.mean("placed", values) == 0.5
    (pair,) = bootstrap.pairs(scores, clusters, 0, 50).values()
    assert pair["placed"].wins.mean == 1
    listed = bootstrap.per_video(scores, clusters)
    assert [row["base"] for row in listed[1:3]] == [{"placed": 0.5}, {}]
    assert bootstrap.without_absent({"placed": values[2:4], "faces": values[2:4]}).keys() == {
        "faces"
    }


def test_evaluation_shows_placed_and_draws_the_boxes(folder):
    rows = prompts(folder, "a.png,One.,", "a.png;b.png,Two.,0 0 .5 1;.5 0 1 1 > 0 0 .5 1")
    config = Config(data=DataConfig(max_people=2), evaluate=EvaluateConfig(videos=1, bootstrap=20))
    out = folder / "run" / "evaluation"
    lines = [{"reward": 0.1, "faces": 1.0}, {"reward": 0.2, "faces": 1.0, "placed": 0.75}]
    videos = all_rows(rows, 1)
    found = {"base": {row.name: line for row, line in zip(videos, lines, strict=True)}}
    commands._conclude(config, rows, videos, found, out)
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["models"]["base"]["placed"]["mean"] == 0.75
    assert "people in their places" in (out / "table.md").read_text()
    for shown in metrics["shown"]:
        (out / shown["videos"]["base"]["path"]).write_bytes(b"")
    page = report.gallery(metrics, out)
    assert page.count('<svg class="places"') == 1
    assert page.count("<rect") == 3
    assert 'x="50" y="0" width="50" height="100" stroke="#0000ff"/>' in page
    assert page.count("stroke-dasharray") == 1


def test_places_and_their_colours_are_inputs_of_a_video(folder):
    rows = prompts(folder, "a.png,One.,", "a.png,One.,0 0 .5 1")
    facts = [journal.prompt_facts(dataclasses.replace(row, id=0)) for row in rows]
    assert facts[0] != facts[1]
    black = Config(data=DataConfig(places_colours="black"))
    assert journal.video_facts(black, None) != journal.video_facts(Config(), None)
