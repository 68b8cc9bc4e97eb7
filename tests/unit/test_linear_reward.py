"""The linear reward: weights are recovered and never negative, worse terms never earn, and the file is checked when it is read."""

import json

import numpy as np
import pytest
import scipy.optimize

from jax_idgrpo import config as c
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import train_linear
from jax_idgrpo.preferences.batches import read_options
from jax_idgrpo.rewards.head import PEOPLE, VIDEO, Tokens
from jax_idgrpo.rewards.linear import DIRECTIONS, LinearReward, load_linear, save_linear

SETTINGS = c.RewardConfig(frames=9, similarity_low=0.0, similarity_high=0.9, missing=0.15)


def tokens(video):
    rows = len(video)
    return Tokens(
        np.zeros((rows, 2, len(PEOPLE))), np.ones((rows, 2), bool), np.asarray(video, np.float32)
    )


def simulated(pairs, wrong, seed=0, features=12):
    """Answers of +1 and -1 to questions, and labels of a judge with known weights."""
    rng = np.random.default_rng(seed)
    weight = np.abs(rng.normal(size=features)) * (rng.random(features) > 0.3)
    a, b = np.sign(rng.normal(size=(2, pairs, features)))
    label = np.sign((a - b) @ weight).astype(int)
    flipped = rng.random(pairs) < wrong
    return a - b, np.where(flipped, -label, label), weight


def test_weights_are_recovered_from_partly_wrong_labels():
    inputs, labels, weight = simulated(1000, wrong=0.2)
    found = train_linear.fit_weights(inputs, labels, 5.0)
    assert found @ weight / np.linalg.norm(found) / np.linalg.norm(weight) > 0.95


def test_more_pairs_agree_better_with_clean_labels():
    test_inputs, clean, _ = simulated(4000, wrong=0.0)
    accuracies = []
    for count in (30, 300, 3000):
        right = []
        for seed in range(5):
            inputs, labels, _ = simulated(4000, wrong=0.2)
            chosen = np.random.default_rng(seed).choice(4000, count, replace=False)
            found = train_linear.fit_weights(inputs[chosen], labels[chosen], 5.0)
            right.append(np.mean(np.sign(test_inputs @ found) == clean))
        accuracies.append(np.mean(right))
    assert accuracies == sorted(accuracies)
    assert accuracies[2] - accuracies[1] < accuracies[1] - accuracies[0]


def test_the_learning_curve_foretells_what_more_pairs_add():
    inputs, labels, _ = simulated(4000, wrong=0.1)
    fresh, clean = inputs[2000:], labels[2000:]

    def accuracy(count):
        found = train_linear.fit_weights(inputs[:count], labels[:count], 5.0)
        return np.mean(np.sign(fresh @ found) == clean)

    for count in (60, 400):
        curve = train_linear.learning_curve(inputs[:count], labels[:count], 5.0, seed=0)
        assert [pairs for pairs, _ in curve] == sorted(pairs for pairs, _ in curve)
        assert curve[0][1] < curve[-1][1]
        gain = train_linear.expected_gain(curve)
        assert abs(gain - (accuracy(count + 100) - accuracy(count))) < 0.05
    assert train_linear.learning_curve(inputs[:19], labels[:19], 5.0, seed=0) == []
    assert train_linear.expected_gain([(10, 0.5)]) is None
    few, many = (
        train_linear.learning_curve(inputs[:count], labels[:count], 5.0, seed=0)
        for count in (60, 1500)
    )
    assert train_linear.expected_gain(many) < train_linear.expected_gain(few)


def test_a_term_that_points_the_wrong_way_gets_no_weight():
    inputs, labels, _ = simulated(500, wrong=0.0)
    inputs[:, 0] = -labels
    found = train_linear.fit_weights(inputs, labels, 5.0)
    assert found[0] == 0
    assert np.all(found >= 0)


def test_the_fit_is_the_minimum_with_ties_and_invalid_pairs():
    inputs, labels, _ = simulated(300, wrong=0.3)
    labels[:60], labels[60:90] = 0, 22
    found = train_linear.fit_weights(inputs, labels, 5.0)
    same = train_linear.fit_weights(
        np.concatenate([inputs[:60], inputs[90:]]), np.concatenate([labels[:60], labels[90:]]), 5.0
    )
    np.testing.assert_allclose(found, same, atol=1e-6)

    def loss(weight):
        kept = np.isin(labels, (-1, 0, 1))
        d, y = inputs[kept] @ weight, labels[kept]

        def win(z):
            return np.log1p(np.exp(-z))

        tie = win(d - np.log(5)) + win(-d - np.log(5)) - np.log(24)
        return np.mean(np.where(y == 0, tie, win(y * d))) + 0.001 * weight @ weight

    reference = scipy.optimize.minimize(
        loss, np.full(12, 0.1), bounds=[(0, None)] * 12, options={"ftol": 1e-14, "maxfun": 10**6}
    )
    np.testing.assert_allclose(found, reference.x, atol=2e-3)


def test_worse_terms_never_raise_the_score():
    names = tuple(DIRECTIONS)
    rng = np.random.default_rng(1)
    limits = np.stack([np.zeros(len(names)), np.ones(len(names))])
    reward = LinearReward(names, limits, rng.random(len(names)))
    video = rng.random((1, len(VIDEO)))
    before = float(reward(tokens(video))[0])
    for name, direction in DIRECTIONS.items():
        for change in (0.1, 3.0):
            worse = video.copy()
            worse[0, VIDEO.index(name)] -= direction * change
            assert float(reward(tokens(worse))[0]) <= before


def stored(folder):
    features = ("identity_mean", "swapped")
    reward = LinearReward(features, np.array([[0.0, 0.0], [1.0, 0.5]]), np.array([1.5, 0.25]))
    save_linear(reward, np.array([[1.0, 0.0], [2.0, 0.5]]), folder, "networks", SETTINGS)
    return reward


def test_the_file_gives_back_the_reward(tmp_path):
    reward = stored(tmp_path)
    again = load_linear(tmp_path, "networks", SETTINGS)
    video = np.random.default_rng(0).random((3, len(VIDEO)))
    np.testing.assert_array_equal(again(tokens(video)), reward(tokens(video)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(networks="others"), "other face networks"),
        (lambda v: v["reading"].update(frames=5), "pass --reward.frames 5"),
        (lambda v: v["features"][0].update(weight=-1.0), "weight of 0 or more"),
        (lambda v: v["features"][0].update(weight=float("nan")), "weight of 0 or more"),
        (lambda v: v["features"][0].update(range=[1.0, 0.0]), "range"),
        (lambda v: v["features"][1].update(direction=1), "direction 1, not -1"),
        (lambda v: v["features"][1].update(name="swaped"), "no feature 'swaped'"),
        (lambda v: v.update(features="all"), "no list of features"),
        (lambda v: v.update(features=[]), "at least one feature"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, change, message):
    stored(tmp_path)
    file = tmp_path / "linear.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as raised:
        load_linear(tmp_path, "networks", SETTINGS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["mimr", "mimr"]}, "each once"),
        ({"features": ["motion"]}, "no feature 'motion'"),
        ({"mixing": "smooth"}, "fitted at once"),
        ({"dimensions": ["SA", "motion"]}, "one dimension"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        read_options(train_linear.LinearOptions, {"pairs": "pairs.csv"} | options)


def test_only_one_learned_reward_is_accepted():
    with pytest.raises(UserError, match="mutually exclusive"):
        c.RewardConfig(head="a", linear="b")
