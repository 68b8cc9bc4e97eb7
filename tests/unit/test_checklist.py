"""Checklists: what a file may hold, how gates and weights make a score, and weights that are found again."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.train_linear import fit_weights
from jax_idgrpo.rewards.vlm.checklist import (
    ChecklistQuestion,
    dimensions_of,
    read_checklist,
    write_checklist,
)
from jax_idgrpo.rewards.vlm.checklist_reward import checklist_terms, counted
from tests.helpers.paths import ROOT

GOOD = {"question": "Is a face seen?", "dimension": "face"}
CHAIN = (
    ChecklistQuestion("a?", "one"),
    ChecklistQuestion("b?", "two", 1, 2.0),
    ChecklistQuestion("c?", "two", 2, 4.0),
)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Is a face seen?"}], "question 1: needs dimension"),
        ([{"dimension": "face"}], "question 1: needs question"),
        ([GOOD, GOOD | {"gate": 2}], "question 2: gate 2 is no earlier question"),
        ([GOOD | {"gate": 1}], "question 1: gate 1, but there is no earlier question"),
        ([GOOD, GOOD | {"gate": "1"}], "question 2: gate '1'"),
        ([GOOD | {"weight": -1}], "weight -1 is no number of 0 or more"),
        ([GOOD | {"weight": "much"}], "weight 'much'"),
        ([GOOD | {"weight": float("nan")}], "weight nan"),
        ([GOOD | {"weight": 0}, GOOD | {"gate": 1}], "no question without a gate has a positive"),
        ([GOOD | {"question": "Rate the faces."}], "no question that yes or no can answer"),
        ([GOOD | {"dimension": "reward"}], "dimension 'reward' cannot name a term"),
        ([GOOD | {"wieght": 1}], "no field 'wieght'.*weight"),
        (["Is a face seen?"], "question 1: is no object"),
        ([], "should hold a list"),
        ({"questions": []}, "should hold a list"),
        ("{[", "is not JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_checklist_is_refused_in_one_line(tmp_path, rows, message):
    file = tmp_path / "checklist.json"
    if rows is not None:
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(UserError, match=message) as error:
        read_checklist(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_the_published_checklist_is_read_and_survives_a_round_trip(tmp_path):
    found = read_checklist(ROOT / "configs" / "checklist_people.json")
    assert 12 <= len(found) <= 16
    assert len(dimensions_of(found)) > 1
    write_checklist(found, tmp_path / "again.json")
    assert read_checklist(tmp_path / "again.json") == found


def test_a_question_counts_if_all_gates_above_it_say_yes():
    logits = jnp.asarray([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    assert counted(logits, CHAIN).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_scores_are_weighted_means_of_the_answers_that_count():
    logits = jnp.asarray([[20.0, 20.0, -20.0], [20.0, -20.0, 20.0], [-20.0, 20.0, 20.0]])
    terms = checklist_terms(logits, CHAIN)
    np.testing.assert_allclose(terms["reward"], [(1 + 2 - 4) / 7, (1 - 2) / 3, -1], atol=1e-6)
    np.testing.assert_allclose(terms["two"], [(2 - 4) / 6, -1, 0], atol=1e-6)
    np.testing.assert_allclose(terms["one"], [1, 1, -1], atol=1e-6)
    unsure = checklist_terms(jnp.zeros((1, 3)), CHAIN)
    assert float(unsure["reward"][0]) == 0


def test_weights_are_found_again_from_simulated_answers():
    rng = np.random.default_rng(0)
    true = np.array([2.0, 1.5, 1.0, 1.0, 0.5, 0.5, 0.0, 3.0, 2.0, 0.0, 1.0, 1.5])
    answers = np.tanh(rng.normal(size=(2, 1000, len(true))))  # soft answers of both videos
    difference = answers[0] - answers[1]
    labels = np.where(difference @ true > 0, 1, -1)
    labels[rng.random(1000) < 0.2] *= -1
    found = fit_weights(difference, labels, 5.0)
    assert found.min() >= 0
    cosine = found @ true / np.linalg.norm(found) / np.linalg.norm(true)
    assert cosine > 0.95
