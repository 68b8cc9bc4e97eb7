"""GRPO: sample groups of videos, score them, move the adapter. Reads from top to bottom.

Step k's prompts, noise and window are functions of (seed, k), so a run that was stopped anywhere goes on to the same adapter as
one that was not. Everything between prompt and updated weights stays on the device: the programs of a step run under a guard
that refuses transfers.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_prompts, prompt_batch, row_digests
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.monitor import Watch
from jax_idgrpo.evaluation.sampler import Model
from jax_idgrpo.metrics import MetricsWriter, progress, read_metrics
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import any_process, assert_same_across_hosts, to_host
from jax_idgrpo.rewards.base import References, check_references, differentiable
from jax_idgrpo.rewards.factory import make_reward, policy_devices
from jax_idgrpo.rewards.host import Pending, Terms, collect
from jax_idgrpo.sampling import conditioning, policy, rollout
from jax_idgrpo.sampling.adapters import save_lora
from jax_idgrpo.training.checkpoint import TERMINATED, open_checkpoints, resume, save, stop_on_sigterm
from jax_idgrpo.training.lock import exclusive
from jax_idgrpo.training.profiling import Profile
from jax_idgrpo.training.selection import check_mixture, choose, failed_in_a_row, group_statistics, mean_of_numbers, members
from jax_idgrpo.training.setup import forward_passes, load, sample, score_latents
from jax_idgrpo.training.state import TrainState, make_optimizer, start
from jax_idgrpo.training.update import Networks, Objective, gather, share, update

SHOWN = 4  # videos kept of a step that writes samples
PHASES = ("seconds_prepare", "seconds_rollout", "seconds_reward", "seconds_update")
"""Seconds of a step: conditioning and photos; sampling, with decoding and scoring beside it; scoring left when all is sampled; update."""


def summary(logged: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The values of a step's updates: means, but the ratio of the first, which is on-policy, and that of the last if there are several."""
    first, *rest = logged
    row = {name: float(np.mean([first[name], *(other[name] for other in rest)])) for name in first}
    for name in ("ratio_min", "ratio_max"):
        if name in first:
            row[name] = float(first[name])
            row |= {f"{name}_last": float(other[name]) for other in rest[-1:]}
    return row


@exclusive
def train(config: Config, workdir: Path, profile: Path | None = None) -> None:
    """Train the adapter for `config.run.steps` steps, continuing what the workdir holds.

    Leaves `config.json metrics.jsonl tensorboard/ checkpoints/ samples/ export/`; the export is a PEFT adapter of the averaged
    weights, written with every checkpoint. On SIGTERM it writes a checkpoint and exits with status 143. profile: a folder for a profile of
    the second and third step.

    Raises:
      UserError: the workdir, the configuration, the prompts or the checkpoint cannot be used, or another process trains in the workdir.
    """
    sampling, seed, last = config.rollout, config.run.seed, config.run.steps

    # ---- what is trained, on what, by what -------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh, policy_devices(config))
    sharding.check_rows(mesh, config.rows_per_call, "rows of one program call (rollout.micro_batch)")
    prompts = load_prompts(config.data.prompts_file(), config.data.max_people)
    listed = row_digests(prompts)
    assert_same_across_hosts(config, listed, workdir=workdir / "checkpoints", adapter=Path(config.model.adapter or workdir / "none"))
    pipe = load(config, mesh)
    conditioning.warn_of_cut(pipe.tokenizer, prompts, config.data.text_length)
    conditioning.warn_of_padding(prompts, config.data.max_people)
    actor, lora, base = policy.split(pipe.transformer, sampling.guidance, config.image_guidance())
    through = config.grpo.objective == "reward_gradient"
    base = sharding.shard_params(mesh, base)
    vae = nnx.split(pipe.vae)
    reward = make_reward(config, mesh)
    check_mixture(config.reward.mixture, reward.term_names)
    scorer = differentiable(reward) if through else None
    check_references(reward, prompts)
    objective = Objective(
        policy=actor if config.grpo.replays or through else actor.unguided(),
        grpo=config.grpo,
        optimizer=make_optimizer(config.optimizer, last * config.grpo.optimizer_steps),
        ema_decay=config.optimizer.ema_decay,
        score=functools.partial(score_latents, scorer.apply, config.data.max_people) if scorer else None,
    )
    schedule = rollout.Schedule.make(sampling.steps, sampling.shift or pipe.shift, sampling.sampler, sampling.noise_level)
    schedule, negative = sharding.device_put_global((schedule, conditioning.encode_negative(pipe, config.data)), sharding.replicated(mesh))
    cache = conditioning.Cache()
    passes = forward_passes(config, actor.branches)

    # ---- where it stands -------------------------------------------------------------------------------------------------
    manager = open_checkpoints(workdir, config.run.keep)
    fresh = start(objective.optimizer, lora)
    state = resume(workdir, config, manager, sharding.shard_params(mesh, fresh), listed)
    done = int(state.step)
    traced = Profile(profile, done, last)
    failed = failed_in_a_row([row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] < done])
    watch = Watch.make(config, pipe, workdir / "watch") if config.run.watch_every else None
    if watch is not None:
        guidance = config.evaluate.guidance or sampling.guidance
        watched = dataclasses.replace(actor, guidance=guidance, image_guidance=config.image_guidance(evaluation=True))
        watch.begin(Model(watched, sharding.shard_params(mesh, fresh.ema), base))

    def rows(tree: Any, chunk: slice) -> Any:
        return sharding.device_put_global(jax.tree.map(lambda leaf: leaf[chunk], tree), sharding.batch_sharding(mesh))

    def keep(state: TrainState, done: int) -> None:
        save(manager, done, state)
        ema = to_host(state.ema)
        if jax.process_index() == 0:
            save_lora(workdir / "export", ema, pipe.transformer.config, dataclasses.asdict(config))

    # ---- train -----------------------------------------------------------------------------------------------------------
    with (
        manager,
        MetricsWriter(workdir, step=done, wandb=config.run.wandb, config_json=config.to_json()) as writer,
        progress("train", last, done) as show,
        stop_on_sigterm() as stopping,
    ):
        while done < last:
            traced.begin(done)
            clock = [time.monotonic()]

            # Prompts and what they ask for: [P], then one row per video.
            chosen = [prompts[index] for index in prompt_batch(prompts, seed, done, sampling.prompts)]
            ids = [prompt.id for prompt in chosen]
            of_row = np.repeat(np.arange(sampling.prompts), sampling.group)
            asked = conditioning.encode(pipe, chosen, config, cache)
            photos = References.of_prompts(chosen, config.data.max_people)
            people = jax.tree.map(lambda leaf: leaf[of_row], reward.encode_references(photos, [prompt.text for prompt in chosen]))
            clock.append(time.monotonic())
            numbers = members(ids, sampling.group)
            first = np.repeat(numbers[:, :1], sampling.group, axis=1)

            def row_keys(root: Key[Array, ""], numbers: Int[np.ndarray, "P G"]) -> Key[Array, "B"]:
                return rng.row_keys(root, jnp.asarray(ids)[of_row], jnp.asarray(numbers.ravel()))

            root = rng.fold(rng.key(seed, "noise"), done)
            noise = row_keys(root, numbers)
            starts = row_keys(root, first if sampling.start_noise == "shared" else numbers)
            again = row_keys(rng.key(seed, "forward"), first if config.grpo.objective == "dpo" else numbers)
            window = rollout.Window(
                start=rollout.window_starts(sampling, seed, done)[of_row],
                size=sampling.trained_steps,
                final_noise=sampling.final_step == "sde",
            )

            # Rollout and reward, chunk by chunk; the device works ahead of the host.
            chunks: list[tuple[rollout.Trajectory, conditioning.Conditioning, Array, Array, Any]] = []
            terms: list[Terms | Pending] = []
            videos: list[Array] = []
            for begin in range(0, sampling.rows, config.rows_per_call):
                chunk = slice(begin, begin + config.rows_per_call)
                start_keys, noise_keys, again_keys, where, encoded = (
                    rows(tree, chunk) for tree in (starts, noise, again, window, people)
                )
                condition = sharding.device_put_global(conditioning.select(asked, of_row[chunk]), sharding.batch_sharding(mesh))
                with jax.transfer_guard("disallow"):
                    given = (actor, state.params, base, condition, negative)
                    trajectory = sample(config, given, schedule, start_keys, noise_keys, where)
                    frames = condition.video_frames(config.data.max_people)
                    video = rollout.decode(vae, trajectory.latents, condition.video_start, frames)
                terms.append(reward.score(video, encoded))
                chunks.append((trajectory, condition, where.start, again_keys, encoded if through else None))
                if len(videos) < SHOWN:
                    videos.append(video[:SHOWN])
            jax.block_until_ready([trajectory.latents for trajectory, *_ in chunks])
            clock.append(time.monotonic())
            collected = [collect(term) for term in terms]
            names = dict.fromkeys(name for term in collected for name in term)
            values = {name: np.concatenate([term.get(name, np.full_like(term["reward"], np.nan)) for term in collected]) for name in names}
            clock.append(time.monotonic())

            # Advantages over whole groups, then one optimizer step per share of the rollout.
            rewards = values.pop("reward")
            grouped = {name: value.reshape(-1, sampling.group) for name, value in values.items()}
            advantage, weight, picks = choose(config.grpo, rewards.reshape(-1, sampling.group), grouped, config.reward.mixture)
            batch = gather(chunks, advantage.reshape(len(chunks), -1), weight.reshape(len(chunks), -1), picks)
            batch = sharding.device_put_global(batch, sharding.batch_sharding(mesh, 1))
            del chunks
            networks = Networks(
                base=base,
                negative=negative,
                old=None if config.grpo.replays or config.grpo.on_policy else jax.tree.map(jnp.copy, state.params),
                scorer=(vae, scorer.state) if scorer else None,
            )
            logged: list[dict[str, Array]] = []
            for number in range(config.grpo.optimizer_steps):
                part = share(batch, number % config.grpo.updates, config.grpo.updates)
                step = sharding.device_put_global(jnp.int32(done * config.grpo.optimizer_steps + number), sharding.replicated(mesh))
                with jax.transfer_guard("disallow"):
                    state, scalars = update(objective, state, networks, part, schedule, step)
                logged.append(scalars)
            state = state.replace(step=state.step + 1)
            scalars = summary(to_host(logged))
            clock.append(time.monotonic())

            # What happened.
            seconds = np.diff(clock)
            row = group_statistics(rewards, sampling.group) | {name: mean_of_numbers(value) for name, value in values.items()}
            row |= scalars | {"advantage_std": float(advantage.std())} | passes
            row |= dict(zip(PHASES, seconds, strict=True)) | {"videos_per_hour": 3600 * sampling.rows / float(seconds.sum())}
            if watch is not None and (done + 1) % config.run.watch_every == 0:
                row |= watch(Model(watched, state.ema, base), done + 1)
            writer.write(done, row)
            traced.end(done, row, PHASES)
            done += 1
            show(done, {"reward": row["reward"], "kl": row.get("kl", 0.0), "loss": row["policy_loss"]})
            failed = failed + 1 if scalars["skipped"] == 1 else 0
            if failed == config.run.give_up_after:
                raise UserError(
                    f"train: no update of the last {failed} steps, up to step {done}, had a finite gradient; see rewards_failed and "
                    f"gradient_norm in {workdir / 'metrics.jsonl'}, and continue from the last checkpoint with a lower learning rate in "
                    "another --workdir"
                )
            if config.run.sample_every and (done % config.run.sample_every == 0 or done == 1):
                shown = np.concatenate(to_host(videos))
                if jax.process_index() == 0:
                    write_samples(workdir / "samples" / f"{done:06d}", shown, chosen, config)
            stop = any_process(stopping())
            if done % config.run.save_every == 0 or done == last or stop:
                keep(state, done)
            if stop and done < last:
                raise SystemExit(TERMINATED)


def write_samples(folder: Path, videos: Float[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt], config: Config) -> None:
    """The first videos of a step as mp4 at the model's frame rate, named by prompt and member."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, video in enumerate(videos[:SHOWN]):
        number, member = divmod(index, config.rollout.group)
        write_video(folder / f"{prompts[number].id:04d}-{member}.mp4", video, config.video.fps)
