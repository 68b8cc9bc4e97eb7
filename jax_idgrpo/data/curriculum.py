"""Order the prompts of a run from few people to many.

At training step t, counted from 0,

    lambda_t = min(1, (t / steps)^power)
    q_t      = round(prompts (1 - lambda_t))

of the step's prompts have at most `people` people. They come from an endless sequence of
permutations of such rows. The others come from the sequence of all rows. A step reads both
sequences where the steps before it stopped, so its prompts are a function of (seed, step).

Source: the curriculum of DisCo (arXiv 2510.01399), which moves from simple prompts to all prompts
in one stage.
"""

import collections
from collections.abc import Sequence

from jax_idgrpo.config import CurriculumSettings, DataConfig
from jax_idgrpo.data.prompts import Prompt, prompt_batch, prompt_sequence
from jax_idgrpo.errors import UserError


def share_of_all(settings: CurriculumSettings, step: int) -> float:
    """Compute lambda_t, the share of a step's prompts that are drawn from all rows, in [0, 1]."""
    return min(1.0, (step / settings.steps) ** settings.power)


def simple_prompts(settings: CurriculumSettings, step: int, count: int) -> int:
    """Compute q_t, the number of a step's prompts that have few people; halves are rounded up.

    Args:
      settings: the curriculum.
      step: training step, from 0.
      count: prompts per step.
    """
    return int(count * (1 - share_of_all(settings, step)) + 0.5)


def check_curriculum(data: DataConfig, prompts: Sequence[Prompt]) -> None:
    """Check that some rows have few people and some have more, if there is a curriculum.

    Raises:
      UserError: all rows are of one kind; the message counts the rows by number of people.
    """
    settings = data.curriculum_settings
    if settings is None:
        return
    simple = sum(prompt.people <= settings.people for prompt in prompts)
    if simple in (0, len(prompts)):
        counts = sorted(collections.Counter(prompt.people for prompt in prompts).items())
        listed = ", ".join(f"{rows} with {people}" for people, rows in counts)
        raise UserError(
            f"data.curriculum: {'no row' if simple == 0 else 'every row'} of {data.prompts} has at most "
            f"{settings.people} people (rows by number of people: {listed}); change people, or leave "
            "data.curriculum out"
        )


def chosen_prompts(
    data: DataConfig, prompts: Sequence[Prompt], seed: int, step: int, count: int
) -> list[int]:
    """Select the prompts of a training step as a pure function of (seed, step).

    Args:
      data: settings of the prompts, with or without a curriculum.
      prompts: all prompts.
      seed: seed of the permutations.
      step: training step, from 0.
      count: prompts per step.

    Returns:
      Indices of the step's prompts, first those with few people.
    """
    settings = data.curriculum_settings
    if settings is None:
        return prompt_batch(prompts, seed, step, count)
    every = range(len(prompts))
    few = [number for number in every if prompts[number].people <= settings.people]
    before = sum(simple_prompts(settings, earlier, count) for earlier in range(step))
    now = simple_prompts(settings, step, count)
    return [
        *prompt_sequence(few, seed, before, now),
        *prompt_sequence(every, seed, step * count - before, count - now),
    ]


def curriculum_metrics(data: DataConfig, chosen: Sequence[Prompt], step: int) -> dict[str, float]:
    """Return the mean number of people of a step's prompts, and lambda_t; nothing without curriculum.

    Args:
      data: settings of the prompts.
      chosen: the prompts of the step.
      step: training step, from 0.
    """
    settings = data.curriculum_settings
    if settings is None:
        return {}
    people = sum(prompt.people for prompt in chosen) / len(chosen)
    return {"people": people, "curriculum": share_of_all(settings, step)}
