"""`data.curriculum`: prompts of few people first, as a pure function of (seed, step)."""

import collections
from pathlib import Path

import pytest

from jax_idgrpo import config as c
from jax_idgrpo.data.curriculum import (
    check_curriculum,
    chosen_prompts,
    curriculum_metrics,
    simple_prompts,
)
from jax_idgrpo.data.prompts import Prompt, prompt_batch
from jax_idgrpo.errors import UserError

PROMPTS = [Prompt(n, str(n), (Path("photo.png"),) * (1 + n % 3)) for n in range(12)]


def data(**settings):
    return c.DataConfig(curriculum=settings)


def sequence(config, steps, count=4, seed=3):
    return [chosen_prompts(config, PROMPTS, seed, step, count) for step in range(steps)]


def test_without_a_curriculum_the_prompts_are_those_of_the_sequence():
    assert sequence(data(), 9) == [prompt_batch(PROMPTS, 3, step, 4) for step in range(9)]


@pytest.mark.parametrize(
    ("settings", "count", "expected"),
    [
        ({"people": 1, "steps": 4}, 4, [4, 3, 2, 1, 0, 0]),
        ({"people": 1, "steps": 4, "power": 2.0}, 4, [4, 4, 3, 2, 0, 0]),  # 4, 3.75, 3, 1.75
        ({"people": 1, "steps": 2}, 3, [3, 2, 0, 0]),  # 1.5 is rounded up
        ({"people": 1, "steps": 1}, 8, [8, 0]),
    ],
)
def test_the_number_of_simple_prompts_is_that_of_the_formula(settings, count, expected):
    config = data(**settings).curriculum_settings
    assert [simple_prompts(config, step, count) for step in range(len(expected))] == expected


def test_steps_begin_with_few_people_and_end_with_all():
    config = data(people=1, steps=6)
    steps = sequence(config, 40)
    for step, chosen in enumerate(steps):
        few = simple_prompts(config.curriculum_settings, step, 4)
        assert all(PROMPTS[number].people == 1 for number in chosen[:few])
    few = [number for step, chosen in enumerate(steps) for number in chosen[: 4 * (step < 6)]]
    assert len(few) == 24
    simple = [
        number
        for step, chosen in enumerate(steps)
        for number in chosen[: simple_prompts(config.curriculum_settings, step, 4)]
    ]
    others = [
        number
        for step, chosen in enumerate(steps)
        for number in chosen[simple_prompts(config.curriculum_settings, step, 4) :]
    ]
    assert sorted(simple[:4]) == [0, 3, 6, 9]
    assert set(simple) == {0, 3, 6, 9}
    for start in range(0, 132, 12):
        assert sorted(others[start : start + 12]) == list(range(12)), "passes without repetition"


def test_a_step_needs_no_memory_of_the_steps_before_it():
    config = data(people=2, steps=5, power=0.5)
    assert chosen_prompts(config, PROMPTS, 3, 7, 4) == sequence(config, 8)[7]
    assert sequence(config, 8) != sequence(config, 8, seed=4)


def test_a_step_logs_its_people_and_its_place_in_the_curriculum():
    config = data(people=1, steps=4)
    assert curriculum_metrics(config, PROMPTS[:3], 1) == {"people": 2.0, "curriculum": 0.25}
    assert curriculum_metrics(config, PROMPTS[:3], 9)["curriculum"] == 1
    assert curriculum_metrics(data(), PROMPTS[:3], 1) == {}


@pytest.mark.parametrize(
    ("people", "said"),
    [
        (3, "every row of .*rows by number of people: 4 with 1, 4 with 2, 4 with 3"),
        (8, "every row"),
    ],
)
def test_rows_of_one_kind_are_refused_with_their_counts(people, said):
    counts = collections.Counter(prompt.people for prompt in PROMPTS)
    assert counts == {1: 4, 2: 4, 3: 4}
    with pytest.raises(UserError, match=said):
        check_curriculum(data(people=people, steps=3), PROMPTS)
    with pytest.raises(UserError, match="no row"):
        check_curriculum(data(people=1, steps=3), [one for one in PROMPTS if one.people > 1])
    check_curriculum(data(people=1, steps=3), PROMPTS)
    check_curriculum(data(), PROMPTS[:1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"people": 2}, "needs steps; add it"),
        ({"steps": 2}, "needs people; add it"),
        ({"people": 2, "steps": 0}, "steps is 0; use a positive whole number"),
        ({"people": 1.5, "steps": 3}, "people is 1.5"),
        ({"people": True, "steps": 3}, "people is True"),
        ({"people": 2, "steps": 3, "power": "x"}, "power is 'x'; use a positive number"),
        ({"people": 2, "steps": 3, "power": float("nan")}, "power is nan"),
        ({"people": 2, "steps": 3, "until": 1}, "no 'until'; use people, steps and power"),
    ],
)
def test_other_settings_are_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        data(**settings)
