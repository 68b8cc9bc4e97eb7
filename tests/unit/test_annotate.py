"""Pairs labelled by a reward: the better value wins, close values tie, and two annotators must agree."""

import math
from pathlib import Path

import numpy as np
import pytest

from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import couples as a
from jax_idgrpo.preferences.annotate import check_options

PROMPTS = [Prompt(n, f"prompt {n}", (Path("photo.png"),)) for n in range(3)]


def videos(values, prompt=0, **more):
    return [
        a.Scored(
            Path(f"{prompt:04d}-{n}.mp4"),
            PROMPTS[prompt],
            {"SA": value} | {name: column[n] for name, column in more.items()},
        )
        for n, value in enumerate(values)
    ]


def by_files(pair):
    """The label as the file that wins."""
    return {"A": pair.a.file, "B": pair.b.file}.get(pair.labels["SA"], pair.labels["SA"])


def test_the_larger_value_wins_whichever_video_is_a():
    found = a.couples(videos([0.1, 0.5, 0.9]), {"SA": 0.0})
    assert len(found) == 3
    for pair in found:
        assert by_files(pair) == max((pair.a, pair.b), key=lambda v: v.values["SA"]).file


def test_the_smaller_value_of_a_fault_wins():
    found = a.couples(videos([0.0, 0.0], swapped=[0.4, 0.1]), {"swapped": 0.0})
    winner = {"A": found[0].a, "B": found[0].b}[found[0].labels["swapped"]]
    assert winner.values["swapped"] == 0.1


def test_the_better_video_is_a_in_about_half_of_the_pairs():
    found = a.couples(videos(np.arange(40.0)), {"SA": 0.0})
    share = np.mean([pair.labels["SA"] == "A" for pair in found])
    assert 0.45 < share < 0.55
    assert found == a.couples(videos(np.arange(40.0)), {"SA": 0.0})  # the hash is no random draw


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (0.0, "same"),
        (0.09, "same"),
        (-0.09, "same"),
        (0.1, "A"),
        (-0.1, "B"),
        (math.nan, "invalid"),
    ],
)
def test_values_within_the_margin_tie(difference, expected):
    assert a.label(difference, 0.1) == expected


def test_margins_are_in_spreads_and_those_of_log_odds_are_the_tie_band():
    found = videos([0.0, 2.0, math.nan], motion=[1.0, 1.0, 1.0])
    bands = a.margins(found, ("SA", "motion"), 0.25, log_odds=False)
    assert bands == {"SA": 0.25, "motion": 0.0}
    bands = a.margins(found, ("SA", "motion"), 0.25, log_odds=True)
    assert bands["SA"] == pytest.approx(math.log(23 / 5))


def test_pairs_per_prompt_mixes_the_largest_and_smallest_differences():
    found = a.couples(videos([0.0, 0.01, 0.5, 1.0]), {"SA": 0.0}, per_prompt=2)
    gaps = sorted(abs(pair.differences["SA"]) for pair in found)
    assert gaps == pytest.approx([0.01, 1.0])


def test_videos_of_different_prompts_are_never_a_pair():
    found = a.couples([*videos([0.1, 0.2]), *videos([0.3, 0.4], prompt=1)], {"SA": 0.0})
    assert len(found) == 2
    assert all(pair.a.prompt is pair.b.prompt for pair in found)


def test_ties_are_limited_and_videos_without_a_score_are_left_out():
    found = a.couples(videos([0.0] * 8 + [5.0, math.nan]), {"SA": 1.0})
    kept = a.select_couples(found, ties=0.2)
    labels = [pair.labels["SA"] for pair in kept]
    assert "invalid" not in labels
    assert labels.count("same") == 2  # a fifth of ten pairs
    assert len(labels) == 10
    assert len(a.select_couples(found, ties=0.0)) == 8


def test_labels_stay_where_both_annotators_agree():
    first = a.couples(videos([0.1, 0.5, 0.9]), {"SA": 0.0})
    second = a.couples(videos([0.1, 0.95, 0.9]), {"SA": 0.0})
    kept = a.agreed(first, second)
    assert sorted(pair.labels["SA"] == "invalid" for pair in kept) == [False, False, True]


def test_kappa_is_one_for_agreement_and_zero_for_chance():
    assert a.kappa(["A", "B", "same"], ["A", "B", "same"]) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    ours, theirs = (rng.choice(["A", "B", "same"], 4000).tolist() for _ in range(2))
    assert abs(a.kappa(ours, theirs)) < 0.05
    assert a.kappa(["A", "B"], ["B", "A"]) == -1.0
    assert math.isnan(a.kappa(["invalid"], ["A"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((["SA", "SA"], 0, 0.25, 0.2), "each once"),
        ((["source"], 0, 0.25, 0.2), "--dimensions source"),
        ((["SA"], -1, 0.25, 0.2), "--pairs-per-prompt is -1"),
        ((["SA"], 0, math.nan, 0.2), "--margin is nan"),
        ((["SA"], 0, 0.25, 1.0), "--ties is 1.0"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        check_options(*options)
