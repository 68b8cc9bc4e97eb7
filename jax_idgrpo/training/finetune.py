"""Train any `Task` with supervision and store the network.

A step is a pure function of (state, seed, step). The batch and every random key derive from the
last two, so an interrupted and resumed run is bitwise equal to an uninterrupted one.
"""

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import MetricsWriter, progress
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import any_process, assert_same_across_hosts, to_device, to_host
from jax_idgrpo.training.checkpoint import open_checkpoints, resume, save
from jax_idgrpo.training.lock import exclusive
from jax_idgrpo.training.signals import TERMINATED, stop_on_signals
from jax_idgrpo.training.state import TrainState, apply_gradients, make_optimizer, start
from jax_idgrpo.training.task import FITTED, Division, Task, make_task

Step = Callable[[TrainState, PyTree, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    task: Task,
    division: Division,
    optimizer: optax.GradientTransformation,
    decay: float,
    seed: int,
) -> Step:
    """Compile the training step: (state, frozen variables, batch, fixed) -> (state, scalars to log).

    `fixed` is a tuple of further arguments of the loss. The step donates its state.

    Args:
      task: the task to train.
      division: of the network.
      optimizer: as made by `make_optimizer`.
      decay: decay of the moving average after its warm-up, in [0, 1).
      seed: seed of the run.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, frozen: PyTree, batch: PyTree, fixed: tuple[PyTree, ...]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = rng.fold(rng.key(seed, "augment"), state.step)

        def loss(params: PyTree) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
            network = division.merge(params, frozen, state.rest)
            value, scalars = task.loss(network, batch, key, *fixed)
            return value, (scalars, division.split(network)[2])

        (value, (scalars, rest)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        state, norms = apply_gradients(state, gradients, optimizer, state.step, decay)
        return dataclasses.replace(state, step=state.step + 1, rest=rest), {
            "loss": value,
            **norms,
            **scalars,
        }

    return step


@exclusive
def finetune(config: Config, workdir: Path) -> None:
    """Train `config.finetune.task` for `config.run.steps` steps; resume if the workdir has a run.

    A task of `FITTED` is solved at once instead.

    Writes `config.json metrics.jsonl tensorboard/ checkpoints/ samples/ export/`. The export
    contains the averaged weights and is also written to `finetune.out`. On SIGTERM, SIGHUP or
    Ctrl-C, a checkpoint is written and the process exits with status 128 plus the signal's number.

    Raises:
      UserError: the workdir or the configuration cannot be used, or the loss is not finite.
    """
    if module := FITTED.get(config.finetune.task):
        importlib.import_module(module).train(config, workdir)
        return
    # ---- set up ----------------------------------------------------------------------------------
    seed, last = config.run.seed, config.run.steps
    task = make_task(config)
    optimizer = make_optimizer(config.optimizer, last)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_rows(mesh, config.finetune.batch, "finetune.batch")
    assert_same_across_hosts(
        config,
        task.rows,
        workdir=workdir / "checkpoints",
        start=Path(config.finetune.start or workdir / "none"),
    )
    if task.prepare is not None:
        task.prepare(workdir)

    def place(made: PyTree) -> PyTree:
        rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        return sharding.device_put_global(
            made, jax.tree.map(lambda x: rows if np.ndim(x) else whole, made)
        )

    def batch(number: int) -> PyTree:
        return place(task.batch(seed, number))

    network = task.init(rng.key(seed, "init"))
    division = Division.of(task, network)
    if division.weights is not None and task.evaluate is not None:
        task.evaluate(network, place)
    fixed = () if task.fixed is None else (task.fixed(network),)
    params, frozen, rest = division.split(network)
    del network
    frozen, parts = sharding.shard_params(mesh, frozen), (params, rest)
    del params, rest
    step = make_step(task, division, optimizer, config.optimizer.ema_decay, seed)

    def with_average(state: TrainState, average: PyTree, kept: PyTree, rest: PyTree) -> nnx.Module:
        ema = jax.tree.map(
            lambda average, value: average.astype(value.dtype), average, state.params
        )
        return division.merge(ema, kept, rest)

    def averaged(state: TrainState) -> nnx.Module:
        return with_average(state, *to_device((state.ema, frozen, state.rest)))

    def evaluating(done: int) -> bool:
        return task.evaluate is not None and (done % task.evaluate_every == 0 or done == last)

    def held_out(state: TrainState, done: int) -> dict[str, float]:
        if task.evaluate is None or not evaluating(done):
            return {}
        return task.evaluate(with_average(state, state.ema, frozen, state.rest), place)

    # ---- resume ----------------------------------------------------------------------------------
    manager = open_checkpoints(workdir, config.run.keep)

    def fresh(params: PyTree, rest: PyTree) -> TrainState:
        return start(optimizer, division.masters(params), rest)

    shardings = sharding.state_shardings(mesh, jax.eval_shape(fresh, *parts))
    state = resume(
        workdir,
        config,
        manager,
        jax.jit(fresh, out_shardings=shardings)(*sharding.shard_params(mesh, parts)),
        task.rows,
    )
    del parts
    done = int(state.step)

    # ---- train -----------------------------------------------------------------------------------
    with (
        manager,
        MetricsWriter(
            workdir, step=done, wandb=config.run.wandb, config_json=config.to_json()
        ) as writer,
        progress(f"finetune {config.finetune.task}", last, done) as update,
        stop_on_signals() as stopping,
    ):
        upcoming = batch(done) if done < last else None
        pending: list[dict[str, jax.Array]] = []
        worse = 0  # steps in a row, see `Task.stop`
        began = time.monotonic()
        while done < last:
            state, scalars = step(state, frozen, upcoming, fixed)
            pending.append(scalars)
            done += 1
            saving, stop = (
                done % config.run.save_every == 0 or done == last,
                any_process(stopping() != 0),
            )
            upcoming = batch(done) if done < last else None  # overlaps with the device's work
            # At most one step is in flight, so that batches do not accumulate on the device.
            jax.block_until_ready(pending[-2:][0])

            # A checkpoint ends a row of metrics, so that a resumed run averages the same steps as
            # an uninterrupted one.
            closing = done % config.finetune.log_every == 0 or saving or stop or evaluating(done)
            gave_up = ""
            if closing:
                rows = [
                    {name: float(value) for name, value in row.items()} for row in to_host(pending)
                ]
                means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
                if not math.isfinite(means["loss"]):
                    raise UserError(
                        f"finetune {config.finetune.task}: the loss is {means['loss']} by step {done}; "
                        "start again in another --workdir with a lower --optimizer.learning_rate"
                    )
                if task.stop is not None:
                    worse = task.stop.count(rows, worse)
                    if worse == task.stop.steps:
                        gave_up = f"in {worse} steps in a row, by step {done}, {task.stop.reason}"
                seconds = time.monotonic() - began
                speed = len(rows) * config.finetune.batch / seconds
                means |= held_out(state, done)
                writer.write(done - 1, {**means, "rows_per_second": speed})
                update(done, {"loss": means["loss"], "rows/s": speed})
            else:
                update(done)
            if saving or stop or gave_up:
                save(manager, done, state)
            if gave_up:
                raise UserError(f"finetune {config.finetune.task}: {gave_up}")
            if (
                task.preview is not None
                and config.run.sample_every
                and done % config.run.sample_every == 0
            ):
                folder = workdir / "samples" / f"{done:06d}"
                network = averaged(state)
                if jax.process_index() == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    task.preview(network, folder)
            if closing:
                pending, began = [], time.monotonic()
            if stop and done < last:
                # The number of a signal that another process received is unknown.
                raise SystemExit(stopping() or TERMINATED)

    # ---- store -----------------------------------------------------------------------------------
    whole = division.weights is not None  # too large for the devices of one process
    network = with_average(state, state.ema, frozen, state.rest) if whole else averaged(state)
    for folder in sorted({workdir / "export", Path(config.finetune.out or workdir / "export")}):
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        if whole or jax.process_index() == 0:
            task.save(network, folder)
