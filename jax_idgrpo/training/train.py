"""Train with GRPO: sample groups of videos, score them, update the trained parameters.

Prompts, noise and window of step k are functions of (seed, k), so an interrupted and resumed run
yields the same parameters as an uninterrupted one. All data between prompts and updated weights
stays on the devices: the programs of a step run under a transfer guard. After a step its data is
freed.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.data.curriculum import check_curriculum, chosen_prompts, curriculum_metrics
from jax_idgrpo.data.prompts import Prompt, load_prompts, row_digests
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.journal import decided
from jax_idgrpo.evaluation.monitor import Watch
from jax_idgrpo.evaluation.sampler import Model
from jax_idgrpo.metrics import MetricsWriter, progress, read_metrics
from jax_idgrpo.models import experts
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import (
    any_process,
    assert_same_across_hosts,
    folder_facts,
    to_host,
)
from jax_idgrpo.rewards.base import (
    References,
    check_references,
    differentiable,
    require_pools,
)
from jax_idgrpo.rewards.factory import policy_devices
from jax_idgrpo.rewards.host import Pending, Terms, collect
from jax_idgrpo.rewards.lookalikes import warn_of_lookalikes
from jax_idgrpo.rewards.placed import require_places
from jax_idgrpo.sampling import conditioning, rollout
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.training.checkpoint import keep_base, open_checkpoints, resume, stored_steps
from jax_idgrpo.training.keeper import Keeper, weights_writer
from jax_idgrpo.training.lock import exclusive
from jax_idgrpo.training.profiling import Profile
from jax_idgrpo.training.selection import (
    choose,
    constant_in_a_row,
    failed_in_a_row,
    group_statistics,
    mean_of_numbers,
    members,
    select_pairs,
)
from jax_idgrpo.training.setup import Run, build, photo_encoder, sample
from jax_idgrpo.training.signals import TERMINATED, stop_on_signals
from jax_idgrpo.training.state import TrainState
from jax_idgrpo.training.update import Networks, Rollout, select_rows, store, update

SHOWN = 4  # number of videos written by a step that writes samples
PHASES = ("seconds_prepare", "seconds_rollout", "seconds_reward", "seconds_update")
"""Metrics with the seconds of each phase of a step.

prepare: encoding prompts and photos. rollout: sampling, and concurrent decoding and scoring.
reward: scoring that remains after all videos are sampled. update: selection and optimizer steps."""
CONSTANT = 10  # consecutive steps with only constant groups, after which a warning is printed

LeaveIfAsked = Callable[[Callable[[], TrainState]], None]
"""Called wherever a run may stop, with a function that returns the last finished state."""


@exclusive
def train(config: Config, workdir: Path, profile: Path | None = None) -> None:
    """Train for `config.run.steps` steps; resume if the workdir has a run.

    Writes `config.json metrics.jsonl tensorboard/ checkpoints/ samples/ export/`. The export is
    written with every checkpoint. It holds the averaged parameters: a PEFT adapter, or the complete
    checkpoint if weights are trained. SIGTERM, SIGHUP and Ctrl-C take effect between the chunks of
    a rollout and between updates: the last finished step is saved, and the process exits with
    status 128 plus the signal's number.

    Args:
      config: the run.
      workdir: folder of the run.
      profile: output folder for a profile of the second and third step; None disables profiling.

    Raises:
      UserError: the workdir, the configuration, the prompts or the checkpoint cannot be used, the
        updates are not finite, or another process trains in the workdir.
    """
    last = config.run.steps

    # ---- set up ----------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh, policy_devices(config))
    sharding.check_rows(
        mesh, config.rows_per_call, "rows of one program call (rollout.micro_batch)"
    )
    prompts = load_prompts(config.data.prompts_file(), config.data.max_people, decode=False)
    conditioning.refuse_controls(prompts, config.model.kind)
    check_curriculum(config.data, prompts)
    weighed = {"reward.mixture": config.reward.mixture, "grpo.pair_terms": config.grpo.pair_terms}
    require_places(weighed, prompts)
    listed = row_digests(prompts)
    assert_same_across_hosts(
        config,
        listed,
        workdir=workdir / "checkpoints",
        adapter=Path(config.model.adapter or workdir / "none"),
        **{f"base LoRA {path}": Path(path) for path in config.model.base_loras},
    )
    run = build(config, mesh)
    conditioning.warn_of_cut(run.pipe.tokenizer, prompts, config.data.text_length)
    conditioning.warn_of_padding(prompts, config.data.max_people)
    cache = conditioning.Cache()
    require_pools(run.reward, prompts)
    check_references(run.reward, prompts, consume=photo_encoder(run, prompts, cache))
    warn_of_lookalikes(run.reward, prompts)
    # The first update donates the arrays of the state.
    run, fresh = dataclasses.replace(run, state=None), run.state

    # ---- resume ----------------------------------------------------------------------------------
    manager = open_checkpoints(workdir, config.run.keep)
    base = {path: folder_facts(Path(path)) for path in config.model.base_loras}
    keep_base(workdir, base, resumes=bool(stored_steps(manager)))
    state = resume(workdir, config, manager, fresh, listed)
    done = int(state.step)
    keeper = Keeper(
        manager, workdir / "export", config, run.pipe.transformer.config, weights_writer(run)
    )
    keeper.begin(state)
    traced = Profile(profile, done, last)
    before = [row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] < done]
    # Network file systems cache files, so the other processes may read an older one.
    failed, constant = decided(lambda: [failed_in_a_row(before), constant_in_a_row(before)])
    watch = begin_watch(run, fresh.ema, workdir / "watch") if config.run.watch_every else None
    del fresh

    # ---- train -----------------------------------------------------------------------------------
    with (
        manager,
        MetricsWriter(
            workdir, step=done, wandb=config.run.wandb, config_json=config.to_json()
        ) as writer,
        progress("train", last, done) as show,
        stop_on_signals() as stopping,
    ):

        def leave_if_asked(finished: Callable[[], TrainState]) -> None:
            if any_process(stopping() != 0):
                keeper.keep(finished(), done)
                # The number of a signal that another process received is unknown.
                raise SystemExit(stopping() or TERMINATED)

        while done < last:
            leave_if_asked(lambda: state)
            traced.begin(done)
            clock = [time.monotonic()]
            batch = prepare(run, prompts, done, cache)
            clock.append(time.monotonic())

            shown = samples_due(config, done)
            sampled, terms, videos = roll_out(run, state, batch, shown, leave_if_asked)
            clock.append(time.monotonic())
            values = collect_all(terms)
            rewards = values.pop("reward")
            clock.append(time.monotonic())

            group, mixture = config.rollout.group, config.reward.mixture
            grouped = {name: value.reshape(-1, group) for name, value in values.items()}
            advantage, weight, picks = choose(
                config.grpo, rewards.reshape(-1, group), grouped, mixture
            )
            sampled = trained_part(run, sampled, advantage, weight, picks)
            state, scalars = train_on(run, state, sampled, done, leave_if_asked)
            chosen = batch.prompts
            del sampled, terms, batch
            clock.append(time.monotonic())

            row = step_metrics(run, rewards, values, advantage, scalars, np.diff(clock))
            if config.grpo.pairs == "dominance":
                row |= select_pairs(config.grpo, rewards.reshape(-1, group), grouped)[2]
            row |= curriculum_metrics(config.data, chosen, done)
            if watch is not None and (done + 1) % config.run.watch_every == 0:
                row |= watch(state.ema, done + 1)
            writer.write(done, row)
            traced.end(done, row, PHASES)
            done += 1
            show(done, headline(row))
            if videos and jax.process_index() == 0:
                folder = workdir / "samples" / f"{done:06d}"
                write_samples(folder, np.concatenate(videos), chosen, config)
            del videos

            failed = failed + 1 if row["skipped"] == 1 else 0
            constant = constant + 1 if row["zero_std_groups"] == 1 else 0
            warn_if_constant(constant, done)
            keeper.judge(row, bool(np.isfinite(rewards).all() and not weight.any()))
            if failed == config.run.give_up_after:
                raise UserError(
                    f"train: no update of the last {failed} steps, up to step {done}, had a finite gradient; {keeper.advice(failed, done)}"
                )
            keeper.keep_if_due(state, done)
        if keeper.doubtful:
            raise UserError(
                f"train: step {done}, the last, had no finite gradient, so that it is not saved; {keeper.advice(failed, done)}"
            )


def begin_watch(
    run: Run, start: nnx.State, folder: Path
) -> Callable[[nnx.State, int], dict[str, float]]:
    """Score held-out prompts before training, unless the scores exist from before a resume.

    Args:
      run: the run.
      start: initial parameters of the run.
      folder: output folder of the scores.

    Returns:
      A function (averaged parameters, training steps done) -> values to log.
    """
    config, base = run.config, run.base
    watched = run.policy.configured(config, run.pipe.shift, evaluation=True)
    watch = Watch.make(config, run.pipe, run.reward, folder)
    watch.begin(Model(watched, start, base))
    return lambda ema, step: watch(Model(watched, ema, base), step)


# ---- prepare -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one rollout: B rows, namely P prompts with G consecutive videos each.

    Attributes:
      prompts: the P prompts.
      of_row: [B] index of each row's prompt.
      conditioning: [P,...] conditioning of the prompts, on the host.
      people: [B,...] encoded references of each row.
      starts: [B] random keys of the start noise.
      noise: [B] random keys of the noise of stochastic steps.
      again: [B] random keys of the noise added to final latents by objectives of kind "latents".
      window: trained steps of each row.
    """

    prompts: Sequence[Prompt]
    of_row: Int[np.ndarray, " B"]
    conditioning: conditioning.Conditioning
    people: Any
    starts: Key[Array, " B"]
    noise: Key[Array, " B"]
    again: Key[Array, " B"]
    window: rollout.Window


def prepare(run: Run, prompts: Sequence[Prompt], step: int, cache: conditioning.Cache) -> Batch:
    """Choose prompts, noise and window of a training step, and encode prompts missing in the cache.

    Args:
      run: the run.
      prompts: all prompts of the run.
      step: training steps done.
      cache: encoded prompts of the whole run.
    """
    config, sampling, seed = run.config, run.config.rollout, run.config.run.seed
    picks = chosen_prompts(config.data, prompts, seed, step, sampling.prompts)
    chosen = [prompts[index] for index in picks]
    ids = [prompt.id for prompt in chosen]
    of_row = np.repeat(np.arange(sampling.prompts), sampling.group)
    asked = conditioning.encode(run.pipe, chosen, config, cache)
    photos = References.of_prompts(chosen, config.data.max_people)
    people = run.reward.encode_references(photos, [prompt.text for prompt in chosen])
    numbers = members(ids, sampling.group)
    first = np.repeat(numbers[:, :1], sampling.group, axis=1)

    def row_keys(root: Key[Array, ""], numbers: Int[np.ndarray, "P G"]) -> Key[Array, " B"]:
        return rng.row_keys(root, jnp.asarray(ids)[of_row], jnp.asarray(numbers.ravel()))

    root = rng.fold(rng.key(seed, "noise"), step)
    return Batch(
        prompts=chosen,
        of_row=of_row,
        conditioning=asked,
        people=jax.tree.map(lambda leaf: leaf[of_row], people),
        starts=row_keys(root, first if sampling.start_noise == "shared" else numbers),
        noise=row_keys(root, numbers),
        again=row_keys(
            rng.key(seed, "forward"), first if "pairs" in config.grpo.needs else numbers
        ),
        window=rollout.Window(
            start=rollout.window_starts(sampling, seed, step, run.schedule.counts)[of_row],
            size=sampling.trained_steps,
            final_noise=sampling.final_step == "sde",
        ),
    )


# ---- roll out ------------------------------------------------------------------------------------


def roll_out(
    run: Run, state: TrainState, batch: Batch, shown: int, leave_if_asked: LeaveIfAsked
) -> tuple[Rollout, list[Terms | Pending], list[np.ndarray]]:
    """Sample and score the videos of a step, chunk by chunk.

    At most two chunks are in flight.

    Args:
      run: the run.
      state: state after the last finished step.
      batch: inputs of the rollout.
      shown: number of videos to copy to the host.
      leave_if_asked: called between chunks.

    Returns:
      The rollout; the reward terms of each chunk, which may be pending; and the first `shown`
      videos on the host.
    """
    size, whole, rows = (
        run.config.rows_per_call,
        sharding.replicated(run.mesh),
        sharding.batch_sharding(run.mesh),
    )
    through, sampled, ahead = run.config.grpo.through_reward, None, None
    terms: list[Terms | Pending] = []
    videos: list[np.ndarray] = []
    chunks = len(batch.of_row) // size
    for number in range(chunks):
        if number:
            leave_if_asked(lambda: state)
        chunk = slice(number * size, (number + 1) * size)
        leaves = (batch.starts, batch.noise, batch.again, batch.window, batch.people)
        starts, noise, again, window, people = sharding.device_put_global(
            jax.tree.map(lambda leaf: leaf[chunk], leaves), rows
        )
        condition = sharding.device_put_global(
            conditioning.select(batch.conditioning, batch.of_row[chunk]), rows
        )
        place = sharding.device_put_global(jnp.int32(number), whole)
        with jax.transfer_guard("disallow"):
            inputs = PolicyInputs(state.params, run.base, condition, run.negative)
            trajectory = sample(run.config, run.policy, inputs, run.schedule, starts, noise, window)
            frames = condition.video_frames(run.config.data.max_people)
            video = rollout.decode(run.vae, trajectory.latents, condition.video_start, frames)
            part = Rollout(
                trajectory=trajectory,
                conditioning=condition,
                start=window.start,
                noise=again,
                people=people if through else None,
            )
            sampled = store(sampled, part, place, chunks)
            del part
        terms.append(run.reward.score(video, people))
        if missing := shown - sum(map(len, videos)):
            videos.append(to_host(video[:missing]))
        jax.block_until_ready(ahead)
        ahead = trajectory.latents
    jax.block_until_ready(ahead)
    assert sampled is not None
    return sampled, terms, videos


def collect_all(terms: Sequence[Terms | Pending]) -> dict[str, Float[np.ndarray, " rows"]]:
    """Wait for the terms of all chunks and concatenate them; absent terms become NaN."""
    collected = [collect(term) for term in terms]
    names = dict.fromkeys(name for term in collected for name in term)
    return {
        name: np.concatenate(
            [term.get(name, np.full_like(term["reward"], np.nan)) for term in collected]
        )
        for name in names
    }


# ---- update --------------------------------------------------------------------------------------


def trained_part(
    run: Run,
    sampled: Rollout,
    advantage: Float[np.ndarray, "P G"],
    weight: Float[np.ndarray, "P G"],
    picks: Int[np.ndarray, " n"] | None,
) -> Rollout:
    """Add advantages and weights to a rollout, and select its trained rows.

    Args:
      run: the run.
      sampled: rollout without advantages and weights.
      advantage: advantage of every video, for P prompts with G videos each.
      weight: weight of every video, 0 or 1.
      picks: indices of the trained rows; None keeps all.
    """
    shape, rows = sampled.start.shape, sharding.batch_sharding(run.mesh, 1)
    advantage, weight = sharding.device_put_global(
        (advantage.reshape(shape), weight.reshape(shape)), rows
    )
    sampled = sharding.device_put_global(
        dataclasses.replace(sampled, advantage=advantage, weight=weight), rows
    )
    if picks is None:
        return sampled
    chosen = sharding.device_put_global(picks, sharding.replicated(run.mesh))
    return sharding.device_put_global(select_rows(sampled, chosen, run.mesh), rows)


def train_on(
    run: Run, state: TrainState, sampled: Rollout, done: int, leave_if_asked: LeaveIfAsked
) -> tuple[TrainState, dict[str, float]]:
    """Take the optimizer steps of a training step. The state is donated.

    Args:
      run: the run.
      state: state after the last finished step.
      sampled: rollout to train on.
      done: training steps done.
      leave_if_asked: called between updates. A copy of `state` is kept in host memory for it.

    Returns:
      The state after the step, and the values to log.
    """
    wanted, on_mesh = run.config.grpo, sharding.state_shardings(run.mesh, state)
    levels = rollout.trained_levels(run.config.rollout, done, run.schedule.counts)
    trained = tuple(expert for expert, count in enumerate(levels) if count) or (0,)
    networks = Networks(
        base=experts.together(
            [
                sharding.fetched(part) if expert in trained else None
                for expert, part in enumerate(experts.each(run.base))
            ]
        ),
        negative=run.negative,
        reference=run.reference,
        old=None if wanted.replays or wanted.on_policy else run.policy.snapshot(state.params),
        scorer=(run.vae, differentiable(run.reward).state) if wanted.through_reward else None,
    )
    finished: PyTree = (
        None
        if wanted.on_policy
        else sharding.device_put_global(state, sharding.in_host_memory(on_mesh))
    )
    logged: list[dict[str, Array]] = []
    for number in range(wanted.optimizer_steps):
        if number:
            jax.block_until_ready(logged)
            leave_if_asked(lambda: sharding.device_put_global(finished, on_mesh))
        step = sharding.device_put_global(
            jnp.int32(done * wanted.optimizer_steps + number), sharding.replicated(run.mesh)
        )
        with jax.transfer_guard("disallow"):
            state, scalars = update(
                run.rule, state, networks, sampled, run.schedule, step, trained=trained
            )
        logged.append(scalars)
    return dataclasses.replace(state, step=state.step + 1), summary(to_host(logged))


def summary(logged: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Summarise the logged values of a step's updates by their means.

    Ratios are not averaged: those of the first update, which is on-policy, are logged, and those of
    the last one if there are several.
    """
    first, *rest = logged
    row = {name: float(np.mean([first[name], *(other[name] for other in rest)])) for name in first}
    for name in ("ratio_min", "ratio_max"):
        if name in first:
            row[name] = float(first[name])
            row |= {f"{name}_last": float(other[name]) for other in rest[-1:]}
    return row


# ---- log -----------------------------------------------------------------------------------------


def samples_due(config: Config, done: int) -> int:
    """Return how many videos of the step after `done` steps are written."""
    every = config.run.sample_every
    return SHOWN if every and ((done + 1) % every == 0 or done == 0) else 0


def step_metrics(
    run: Run,
    rewards: Float[np.ndarray, " B"],
    terms: dict[str, Float[np.ndarray, " B"]],
    advantage: Float[np.ndarray, "P G"],
    scalars: dict[str, float],
    seconds: Float[np.ndarray, " phases"],
) -> dict[str, float]:
    """Return the metrics of a training step.

    Args:
      run: the run.
      rewards: rewards of the step's videos, NaN where one failed.
      terms: terms of the rewards by name.
      advantage: advantages of the videos.
      scalars: metrics of the updates.
      seconds: seconds of each of `PHASES`.
    """
    row = group_statistics(rewards, run.config.rollout.group)
    row |= {name: mean_of_numbers(value) for name, value in terms.items()}
    row |= scalars | {"advantage_std": float(advantage.std())} | dict(run.passes)
    row |= dict(zip(PHASES, map(float, seconds), strict=True))
    return row | {"videos_per_hour": 3600 * run.config.rollout.rows / float(seconds.sum())}


def headline(row: dict[str, float]) -> dict[str, float]:
    """Return the metrics that the progress bar shows."""
    return {"reward": row["reward"], "kl": row.get("kl", 0.0), "loss": row["policy_loss"]}


def warn_if_constant(constant: int, done: int) -> None:
    """Warn once when all rewards were equal within every group for `CONSTANT` consecutive steps.

    `constant` is the number of such steps up to step `done`.
    """
    if constant == CONSTANT and jax.process_index() == 0:
        warnings.warn(
            f"step {done}: in each of the last {CONSTANT} steps the rewards of every group were all equal, so that nothing is learned; "
            "look at samples/ and at the reward's terms in metrics.jsonl, and see whether the reward tells videos apart "
            "(reward.similarity_low, similarity_high and penalties)",
            stacklevel=2,
        )


def write_samples(
    folder: Path, videos: Float[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt], config: Config
) -> None:
    """Write videos as mp4 at the model's frame rate, named by prompt and member.

    Args:
      folder: output folder.
      videos: videos in [-1, 1]; the videos of a prompt are consecutive.
      prompts: prompts in the order of the groups.
      config: the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, video in enumerate(videos):
        number, member = divmod(index, config.rollout.group)
        write_video(folder / f"{prompts[number].id:04d}-{member}.mp4", video, config.video.fps)
