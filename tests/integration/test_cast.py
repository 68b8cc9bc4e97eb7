"""The cast: people are functions of their ids, and the truth of a clip agrees with its pixels."""

import jax
import numpy as np
import pytest

from jax_idgrpo.synthetic import captions, scenes


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """A few dozen pictures: compiling with all optimisations would take far longer than drawing saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_takes_share_people_photos_and_prompts_and_nothing_else():
    one, other, again = (scenes.batch(1, 0, 12, "eval", variant=variant) for variant in (0, 1, 1))
    assert captions.prompts(one) == captions.prompts(other)
    for name in ("portraits", "portrait_boxes", "ids", "mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(other.video, again.video)
    np.testing.assert_array_equal(one.video, scenes.batch(1, 0, 12, "eval").video)
    assert (np.abs(one.video - other.video).mean((1, 2, 3, 4)) > 0.02).all()
