"""What a run keeps: a checkpoint with its export, and never those of a state whose update was not finite."""

import numpy as np
import pytest

from jax_idgrpo import config as c
from jax_idgrpo.models.wan import vace_1_3b
from jax_idgrpo.training import keeper as module
from jax_idgrpo.training.keeper import Keeper
from jax_idgrpo.training.state import TrainState

FINE, FAILED = {"skipped": 0.0}, {"skipped": 1.0}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A keeper of a run of six steps that saves every second, and the steps that it saved and exported."""
    saved: list[int] = []
    exported: list[int] = []
    monkeypatch.setattr(module, "save", lambda manager, step, state: saved.append(step))
    monkeypatch.setattr(
        module, "save_lora", lambda path, state, config, training, step: exported.append(step)
    )
    monkeypatch.setattr(module, "saved_step", lambda path: exported[-1] if exported else None)
    config = c.Config(run=c.RunConfig(steps=6, save_every=2))
    return Keeper(None, tmp_path / "export", config, vace_1_3b()), saved, exported


def state(step):
    return TrainState(step=np.int32(step), params=None, ema=np.zeros(2), optimizer=None)


def follow(keeper, rows, nothing_to_train=False):
    for done, row in enumerate(rows, 1):
        keeper.judge(row, nothing_to_train)
        keeper.keep_if_due(state(done), done)


def test_a_run_that_works_is_saved_and_exported_when_it_is_due(kept):
    keeper, saved, exported = kept
    keeper.begin(state(0))
    follow(keeper, [FINE] * 6)
    assert saved == exported == [2, 4, 6]
    assert not keeper.doubtful


def test_a_step_that_fails_is_not_saved_and_the_next_that_works_is(kept):
    keeper, saved, exported = kept
    keeper.begin(state(0))
    follow(keeper, [FINE, FINE, FAILED, FAILED, FINE, FAILED])
    assert saved == exported == [2, 5]
    assert keeper.doubtful
    keeper.keep(state(6), 6)  # nor is it when the run is asked to stop
    assert saved == [2, 5]
    assert "--model.adapter" not in keeper.advice(1, 6)  # step 5 may be what made step 6 fail
    assert f"adapter of step 5 with --model.adapter {keeper.export}" in keeper.advice(1, 7)


def test_steps_with_nothing_to_train_on_are_saved(kept):
    keeper, saved, exported = kept
    keeper.begin(state(0))
    follow(keeper, [FAILED] * 6, nothing_to_train=True)
    assert saved == exported == [2, 4, 6]
    assert not keeper.doubtful


def test_an_export_of_another_step_than_the_checkpoint_is_written_again(kept):
    keeper, saved, exported = kept
    exported.append(2)
    keeper.begin(state(4))
    keeper.begin(state(4))
    keeper.keep(state(4), 4)
    assert exported == [2, 4]
    assert saved == []
    keeper.begin(state(0))  # a run that has not begun has nothing to export
    assert exported == [2, 4]
