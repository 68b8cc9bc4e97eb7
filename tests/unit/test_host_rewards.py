"""Rewards on the host: handed over without waiting, bounded, and a video that cannot be scored costs itself alone."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.rewards.host import HostPool, collect


def mean(video, number):
    return {"reward": float(video.mean()), "number": float(number)}


def test_rows_keep_their_order_and_are_float32():
    videos = np.random.default_rng(0).normal(size=(5, 2, 4, 4, 3)).astype(np.float32)
    terms = collect(HostPool(workers=3).submit(mean, (jnp.asarray(videos), np.arange(5))))
    np.testing.assert_allclose(terms["reward"], videos.mean((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_array_equal(terms["number"], np.arange(5))
    assert terms["reward"].dtype == np.float32


def test_terms_that_are_there_already_pass_through():
    np.testing.assert_array_equal(collect({"reward": jnp.arange(3.0)})["reward"], [0, 1, 2])


def test_a_video_that_raises_costs_itself_and_is_named():
    def fussy(number):
        if number == 1:
            raise RuntimeError("no face\nin any frame")
        return {"reward": float(number)}

    with pytest.warns(
        UserWarning, match=r"^face reward: video 1 could not be scored \(RuntimeError: no face\)"
    ):
        terms = collect(HostPool().submit(fussy, (np.arange(3),), "face reward"))
    np.testing.assert_array_equal(terms["reward"], [0, np.nan, 2])


def test_where_every_video_raises_there_is_a_reward_still():
    def broken(number):
        raise ValueError("always")

    with pytest.warns(UserWarning, match="could not be scored"):
        terms = collect(HostPool().submit(broken, (np.arange(2),)))
    assert np.isnan(terms["reward"]).all()
    assert terms.keys() == {"reward"}


def test_handing_over_does_not_wait_until_too_many_are_in_flight():
    gate, third = threading.Event(), threading.Event()

    def slow(number):
        assert gate.wait(30)
        return {"reward": float(number)}

    pool = HostPool(workers=1, in_flight=2)
    first, second = (
        pool.submit(slow, (np.arange(2),)) for _ in range(2)
    )  # returns although nothing can be scored yet
    assert not first.done()
    assert not second.done()

    def hand_over():
        pool.submit(slow, (np.arange(2),))
        third.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert not third.wait(0.2)  # the third waits for the first
    gate.set()
    assert third.wait(30)
    thread.join()
    np.testing.assert_array_equal(collect(second)["reward"], [0, 1])
