"""Head turns: the geometry of the yaw, its bins, and what a comparison shows of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.rewards.turns import YawCalibration, fit_yaw, head_turn, turn_terms, yaw

EYES, NOSE = 60.0, 35.0  # distance of the eyes, and how far the nose stands out
EXACT = YawCalibration(a=1.0, b=EYES / NOSE)


def landmarks(degrees, roll=0.0, scale=1.0, shift=(0.0, 0.0)):
    """The landmarks of a head seen from afar, after turning and tilting it."""
    head = np.array(
        [[-EYES / 2, 0, 0], [EYES / 2, 0, 0], [0, 35, NOSE], [-25, 70, 0], [25, 70, 0]], float
    )
    a, r = np.radians(degrees), np.radians(roll)
    x = head[:, 0] * np.cos(a) + head[:, 2] * np.sin(a)
    turned = np.stack([x, head[:, 1]], -1)
    tilted = turned @ np.array([[np.cos(r), np.sin(r)], [-np.sin(r), np.cos(r)]])
    return (scale * tilted + shift).astype(np.float32)


@pytest.mark.parametrize("degrees", [-60, -25, 0, 10, 45, 60])
def test_the_yaw_of_a_head_is_exact_wherever_it_is(degrees):
    straight = landmarks(degrees)
    assert float(yaw(head_turn(straight), EXACT)) == pytest.approx(degrees, abs=0.01)
    # The line through the eyes is tilted by roll, which must not look like a turn.
    for moved in (landmarks(degrees, 0, 3.0, (50, 9)), landmarks(degrees, 0, 0.2)):
        assert float(yaw(head_turn(moved), EXACT)) == pytest.approx(degrees, abs=0.01)


def test_a_tilted_head_is_not_turned():
    front = landmarks(0, roll=25)
    front[2] = front[:2].mean(0)  # the nose between the eyes, whatever its height
    assert float(head_turn(front)) == pytest.approx(0, abs=1e-5)


def test_a_face_without_size_has_a_finite_turn():
    turn = head_turn(np.zeros((5, 2)))
    assert np.isfinite(turn)
    gradient = jax.grad(lambda points: head_turn(points))(jnp.zeros((5, 2)))
    assert np.isfinite(gradient).all()


def test_constants_are_fitted():
    random = np.random.default_rng(0)
    truth = random.uniform(-70, 70, 500)
    turn = np.array([float(head_turn(landmarks(angle))) for angle in truth])
    found = fit_yaw(turn, truth)
    assert found.b == pytest.approx(EXACT.b, abs=0.1)
    error = np.abs(np.asarray(yaw(turn, found)) - truth)
    assert error.max() < 1.5
    # Landmarks that show nothing: the best guess is the mean, whatever the turn.
    blind = fit_yaw(random.normal(size=500) * 0.2, truth)
    assert abs(blind.a) < 0.3


def case():
    """One video of two people and three frames, and one of one person who is never found."""
    degrees = np.array([[[0, 30], [50, -10], [-40, 0]], [[0, 0]] * 3], float)
    turn = jnp.asarray(np.tan(np.radians(degrees)) / EXACT.b, jnp.float32)
    matched = jnp.array([[[1, 1], [1, 1], [1, 0]], [[0, 0]] * 3], bool)
    similarity = jnp.array([[[0.9, 0.6], [0.3, 0.8], [0.5, 0.0]], [[0.0, 0.0]] * 3])
    return turn, similarity, matched, jnp.array([[True, True], [True, False]])


def test_terms_by_hand():
    terms = {name: np.asarray(x) for name, x in turn_terms(*case(), EXACT).items()}
    # Person 0 turns from -40 to 50 degrees, person 1 from -10 to 30.
    assert terms["turning"][0] == pytest.approx((90 / 90 + 40 / 90) / 2, abs=1e-4)
    assert terms["turning"][1] == 0
    for name, share, cosine in (
        ("frontal", 2 / 5, (0.9 + 0.8) / 2),
        ("half", 2 / 5, (0.6 + 0.5) / 2),
        ("side", 1 / 5, 0.3),
    ):
        assert terms[f"faces_{name}"][0] == pytest.approx(share)
        assert terms[f"similarity_{name}"][0] == pytest.approx(cosine)
        assert np.isnan(terms[f"faces_{name}"][1])
        assert np.isnan(terms[f"similarity_{name}"][1])


def test_a_row_is_independent_of_the_others_and_of_padding():
    turn, similarity, matched, mask = case()
    together = turn_terms(turn, similarity, matched, mask, EXACT)
    alone = turn_terms(turn[:1], similarity[:1], matched[:1], mask[:1], EXACT)
    pad = ((0, 0), (0, 0), (0, 2))
    padded = turn_terms(
        jnp.pad(turn, pad, constant_values=2.0),
        jnp.pad(similarity, pad),
        jnp.pad(matched, pad, constant_values=True),
        jnp.pad(mask, ((0, 0), (0, 2))),
        EXACT,
    )
    for name in together:
        np.testing.assert_allclose(together[name][:1], alone[name], rtol=1e-6)
        np.testing.assert_allclose(together[name], padded[name], rtol=1e-6)


def test_freezing_a_clip_stops_the_turning():
    turn, similarity, matched, mask = case()
    still = jnp.repeat(turn[:, :1], 3, axis=1)
    frozen = turn_terms(still, similarity, jnp.ones_like(matched), mask, EXACT)
    np.testing.assert_array_equal(frozen["turning"], 0)


def test_bins_of_too_few_videos_are_not_compared():
    many = np.linspace(0, 1, 12)
    few = np.where(np.arange(12) < bootstrap.FEWEST - 1, many, np.nan)
    enough = np.where(np.arange(12) < bootstrap.FEWEST, many, np.nan)
    scores = {
        "base": {"faces": many, "similarity_side": many, "similarity_half": enough},
        "tuned": {"faces": many, "similarity_side": few, "similarity_half": many},
    }
    kept = bootstrap.without_rare(scores)
    assert [set(metrics) for metrics in kept.values()] == [{"faces", "similarity_half"}] * 2
    means, changes = bootstrap.summarise(kept, np.arange(12), seed=0, resamples=50)
    assert means["base"]["similarity_half"].mean == pytest.approx(np.nanmean(enough))
    assert changes["tuned"]["similarity_half"].mean == 0


def test_turning_alone_is_refused():
    with pytest.raises(
        UserError, match=r"turning cannot be the only reward.*another term a weight"
    ):
        RewardConfig(mixture={"reward": 0, "turning": 1})
    RewardConfig(mixture={"turning": 0.25})
