"""The smallest run of the bundled models, and what it leaves."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import load_file

from jax_idgrpo import config as c
from jax_idgrpo.training import setup


def tiny(steps, grpo=None, **rollout):
    """Return the configuration of a run of `steps` steps on the bundled models.

    Args:
      steps: optimizer steps of the run.
      grpo: fields of the GRPO configuration.
      **rollout: fields of the rollout configuration.
    """
    values = (
        dict(
            prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_start=0, window_size=1
        )
        | rollout
    )
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(**values),
        grpo=c.GrpoConfig(**(grpo or {})),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps=steps, save_every=2, sample_every=2, give_up_after=2),
    )


def full(steps, patterns="", **changes):
    """Return the configuration of such a run that trains weights of the bundled model.

    Args:
      steps: as in `tiny`.
      patterns: of the trained weights.
      **changes: as in `tiny`.
    """
    config = tiny(steps, **changes)
    model = dataclasses.replace(config.model, train="full", train_layers=patterns, remat="full")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def rows(workdir):
    """Return the rows of a run's metrics, one dictionary per step."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def failing(monkeypatch, broken):
    """The embedded reward, whose scores are no numbers for the rows `broken(call)` of each call."""
    real = setup.make_reward
    calls = []

    def make(config, mesh):
        reward = real(config, mesh)
        scored = reward.score

        def score(*given):
            calls.append(0)
            terms = scored(*given)
            return terms | {"reward": np.where(broken(len(calls)), np.nan, terms["reward"])}

        monkeypatch.setattr(reward, "score", score)
        return reward

    monkeypatch.setattr(setup, "make_reward", make)
    return calls


def adapter(workdir):
    """Return the tensors of the adapter that a run exported."""
    return load_file(workdir / "export" / "adapter_model.safetensors")


def assert_same_adapter(workdir, other):
    """Two runs exported the same adapter, bit for bit."""
    one, two = adapter(workdir), adapter(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(two[name], tensor, err_msg=name)
