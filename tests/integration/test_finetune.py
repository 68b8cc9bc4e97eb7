"""The supervised loop on a toy task: exact resume, one compilation, what it leaves behind."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo import rng
from jax_idgrpo.config import Config, FinetuneConfig, OptimizerConfig, RunConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import read_metrics
from jax_idgrpo.training.finetune import finetune
from jax_idgrpo.training.signals import TERMINATED
from jax_idgrpo.training.task import Task, make_task


class Toy(nnx.Module):
    """Parameters, running means and a dropout stream: every kind of variable that a checkpoint must hold."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.linear(x)))))


@dataclasses.dataclass
class Calls:
    """What a run called: traces of the loss, batches by step, previews; and what befalls it while a step's batch is made."""

    traces: int = 0
    batches: list = dataclasses.field(default_factory=list)
    previews: int = 0
    sigterm_at: int = -1
    crash_at: int = -1


@jax.jit
def toy_batch(seed, step):
    x = jax.random.normal(rng.fold(rng.key(seed, "data"), step), (8, 4))
    return {"x": x, "y": jnp.sin(x.sum(axis=1, keepdims=True)) + 1.0}


@jax.jit
def toy_network(key):
    return nnx.split(Toy(nnx.Rngs(key)))


@nnx.jit
def toy_apply(network, x):
    return network(x)


def toy_task(calls: Calls) -> Task:
    def batch(seed: int, step: int):
        calls.batches.append(step)
        if step == calls.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == calls.crash_at:
            raise MemoryError
        return toy_batch(seed, step)

    def loss(network: Toy, batch, key):
        calls.traces += 1
        noise = 0.01 * jax.random.normal(key, batch["y"].shape)
        error = network(batch["x"]) - batch["y"] - noise
        return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}

    def save(network: Toy, folder: Path):
        leaves = jax.tree_util.tree_leaves_with_path(nnx.state(network, (nnx.Param, nnx.BatchStat)))
        np.savez(folder / "toy.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})

    def preview(network: Toy, folder: Path):
        calls.previews += 1
        np.save(folder / "toy.npy", toy_apply(network, jnp.ones((2, 4))))

    return Task(lambda key: nnx.merge(*toy_network(key)), batch, loss, save, preview)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The workdir of six undisturbed steps."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_idgrpo.training.finetune.make_task", lambda config: toy_task(Calls()))
        finetune(configuration(6), workdir)
    return workdir


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setattr("jax_idgrpo.training.finetune.make_task", lambda config: toy_task(calls))
    return calls


def configuration(steps: int, **run) -> Config:
    return Config(
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2),
        run=RunConfig(**{"steps": steps, "save_every": 3, "sample_every": 2, **run}),
        finetune=FinetuneConfig(task="vae", batch=8, log_every=2),
    )


def export(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "export" / "toy.npz") as arrays:
        return dict(arrays)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def numbers(workdir: Path) -> list[dict]:
    """The rows without the one number that is a speed."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name != "rows_per_second"} for row in rows
    ]


def test_resumed_run_equals_an_undisturbed_one(tmp_path, calls, straight):
    finetune(configuration(3), tmp_path)
    half = export(tmp_path)
    finetune(configuration(6), tmp_path)
    assert same(export(straight), export(tmp_path))
    assert not same(half, export(tmp_path))
    assert numbers(straight) == numbers(tmp_path)


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, calls, straight):
    calls.sigterm_at = 4
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        finetune(configuration(6), tmp_path)
    assert stopped.value.code == TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "export").exists()
    calls.sigterm_at, calls.batches[:] = -1, []
    finetune(configuration(6), tmp_path)
    assert calls.batches[0] >= 4
    assert same(export(straight), export(tmp_path))


def test_a_crash_costs_the_steps_since_the_checkpoint(tmp_path, calls, straight):
    calls.crash_at = 5
    with pytest.raises(MemoryError):
        finetune(configuration(6), tmp_path)
    calls.crash_at, calls.batches[:] = -1, []
    finetune(configuration(6), tmp_path)
    assert calls.batches == [3, 4, 5]
    assert same(export(straight), export(tmp_path))
    assert numbers(straight) == numbers(tmp_path)


def test_one_compilation_and_each_batch_once(tmp_path, calls):
    finetune(configuration(7), tmp_path)
    assert calls.traces == 1
    assert calls.batches == list(range(7))
    assert calls.previews == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "export",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000002",
        "000004",
        "000006",
    ]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7]


def test_loss_falls_and_the_out_folder_gets_the_network(tmp_path, calls):
    config = configuration(60, save_every=60, sample_every=0)
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, out=str(tmp_path / "out"))
    )
    finetune(config, tmp_path / "work")
    rows = read_metrics(tmp_path / "work" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert (tmp_path / "out" / "toy.npz").read_bytes() == (
        tmp_path / "work" / "export" / "toy.npz"
    ).read_bytes()


def test_a_finished_run_only_exports(tmp_path, calls):
    finetune(configuration(4), tmp_path)
    calls.batches.clear()
    finetune(configuration(4), tmp_path)
    assert calls.batches == []


def test_changed_learning_rate_is_refused_by_name(tmp_path, calls):
    finetune(configuration(3), tmp_path)
    before = (tmp_path / "config.json").read_text()
    changed = dataclasses.replace(
        configuration(6), optimizer=OptimizerConfig(learning_rate=2e-2, warmup=2)
    )
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.01 and is 0\.02"):
        finetune(changed, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    task = toy_task(Calls())
    broken = dataclasses.replace(task, loss=lambda *a: (task.loss(*a)[0] * jnp.nan, {}))
    monkeypatch.setattr("jax_idgrpo.training.finetune.make_task", lambda config: broken)
    with pytest.raises(UserError, match=r"the loss is nan by step 2"):
        finetune(configuration(6), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_unknown_task_names_the_closest():
    with pytest.raises(UserError, match="did you mean embedder"):
        make_task(dataclasses.replace(Config(), finetune=FinetuneConfig(task="embeder")))


def test_a_run_is_not_continued_on_other_rows(tmp_path, calls, monkeypatch):
    rows = ["a-a", "b-b", "c-c"]
    monkeypatch.setattr(
        "jax_idgrpo.training.finetune.make_task",
        lambda config: dataclasses.replace(toy_task(calls), rows=list(rows)),
    )
    finetune(configuration(3), tmp_path)
    finetune(configuration(3), tmp_path)
    rows.remove("b-b")
    with pytest.raises(
        UserError,
        match="cannot resume exactly: the data is not what the run in .* began with: row 1 removed",
    ):
        finetune(configuration(6), tmp_path)
