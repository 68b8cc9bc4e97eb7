"""GRPO: sample groups of videos, score them, move the adapter. Reads from top to bottom.

Step k's prompts, noise and window are functions of (seed, k), so a run that was stopped anywhere goes on to the same adapter as
one that was not. Everything between prompt and updated weights stays on the device.
"""

import collections
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_idgrpo import conditioning, grpo, keys, parallel, policy, rollout
from jax_idgrpo.checkpoint import TERMINATED, open_checkpoints, prepare_workdir, resume, save, stop_on_sigterm
from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_prompts, prompt_batch
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluate import make_reward, references
from jax_idgrpo.metrics import MetricsWriter, progress
from jax_idgrpo.optimizer import make_optimizer
from jax_idgrpo.pipeline import Pipeline, load_pipeline, save_lora
from jax_idgrpo.state import TrainState, start
from jax_idgrpo.update import Objective, Rollout, update
from jax_idgrpo.video import write_video

SHOWN = 4  # videos kept of a step that writes samples


def members(ids: Sequence[int], group: int) -> Int[np.ndarray, "P G"]:
    """Numbers of the videos of each prompt; a prompt that comes twice in a step goes on counting, so that no two videos are the same."""
    seen: collections.Counter[int] = collections.Counter()
    numbers = []
    for prompt in ids:
        numbers.append(np.arange(group) + group * seen[prompt])
        seen[prompt] += 1
    return np.stack(numbers)


def group_statistics(rewards: Float[np.ndarray, "B"], group: int) -> dict[str, float]:
    """What the rewards of a step (groups one after another) say: mean, spread within groups, and the share of groups without any."""
    spread = rewards.reshape(-1, group).std(axis=1)
    return {
        "reward": float(rewards.mean()),
        "reward_group_std": float(spread.mean()),
        "zero_std_groups": float(np.mean(spread == 0)),
    }


def load(config: Config) -> Pipeline:
    """The pipeline of `config.model`, with a fresh adapter or the one it names."""
    model = config.model
    pipe = load_pipeline(
        model.folder(), model.dtype, "vace", model.rank, model.alpha, seed=config.run.seed, remat=model.remat, unroll=model.unroll
    )
    if model.adapter:
        pipe.load_lora(model.adapter)
        found = pipe.transformer.config
        if (found.rank, found.alpha) != (model.rank, model.alpha):
            raise UserError(
                f"model.adapter {model.adapter}: rank {found.rank}, alpha {found.alpha:g}; set --model.rank and --model.alpha to these"
            )
    return pipe


def train(config: Config, workdir: Path) -> None:
    """Train the adapter for `config.run.steps` steps, continuing what the workdir holds.

    Leaves `config.json metrics.jsonl tensorboard/ checkpoints/ samples/ export/`; the export is a PEFT adapter of the averaged
    weights, written with every checkpoint. On SIGTERM it writes a checkpoint and exits with status 143.

    Raises:
      UserError: the workdir, the configuration, the prompts or the checkpoint cannot be used.
    """
    workdir = Path(workdir)
    prepare_workdir(workdir)
    sampling, seed, last = config.rollout, config.run.seed, config.run.steps

    # ---- what is trained, on what, by what -------------------------------------------------------------------------------
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_rows(mesh, config.rows_per_call, "rows of one program call (rollout.micro_batch)")
    prompts = load_prompts(config.data.prompts_file(), config.data.max_people)
    pipe = load(config)
    actor, lora, base = policy.split(pipe.transformer, sampling.guidance)
    base = parallel.place(mesh, base)
    vae = nnx.split(pipe.vae)
    reward = make_reward(config.reward)
    objective = Objective(
        policy=actor,
        grpo=config.grpo,
        optimizer=make_optimizer(config.optimizer, last * config.grpo.updates),
        ema_decay=config.optimizer.ema_decay,
    )
    schedule = rollout.Schedule.make(sampling.steps, sampling.shift or pipe.shift)
    negative = conditioning.encode_negative(pipe, config.data)
    cache: conditioning.Cache = {}

    # ---- where it stands -------------------------------------------------------------------------------------------------
    manager = open_checkpoints(workdir, config.run.keep)
    fresh = start(objective.optimizer, lora)
    state = resume(workdir, config, manager, parallel.place(mesh, fresh))
    done = int(state.step)

    def rows(tree: Any, chunk: slice) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf[chunk], parallel.batch_sharding(mesh)), tree)

    def keep(state: TrainState, done: int) -> None:
        save(manager, done, state)
        if jax.process_index() == 0:
            save_lora(workdir / "export", state.ema, pipe.transformer.config)

    # ---- train -----------------------------------------------------------------------------------------------------------
    with (
        manager,
        MetricsWriter(workdir, step=done, wandb=config.run.wandb, config_json=config.to_json()) as writer,
        progress("train", last, done) as show,
        stop_on_sigterm() as stopping,
    ):
        while done < last:
            clock = [time.monotonic()]

            # Prompts and what they ask for: [P], then one row per video.
            chosen = [prompts[index] for index in prompt_batch(prompts, seed, done, sampling.prompts)]
            ids = [prompt.id for prompt in chosen]
            of_row = np.repeat(np.arange(sampling.prompts), sampling.group)
            asked = conditioning.select(conditioning.encode(pipe, chosen, config, cache), of_row)
            photos = references(chosen, config)
            people = (reward.embed_references(photos, [prompt.text for prompt in chosen])[of_row], jnp.asarray(photos.mask[of_row]))
            root = keys.fold(keys.key(seed, "noise"), done)
            numbers = members(ids, sampling.group)
            noise = keys.row_keys(root, jnp.asarray(ids)[of_row], jnp.asarray(numbers.ravel()))
            first = np.repeat(numbers[:, 0], sampling.group) if sampling.start_noise == "shared" else numbers.ravel()
            starts = keys.row_keys(root, jnp.asarray(ids)[of_row], jnp.asarray(first))
            trained = rollout.window(sampling, seed, done)
            draws = jnp.asarray(rollout.stochastic(sampling, trained))

            # Rollout and reward, chunk by chunk; the device works ahead of the host.
            chunks: list[tuple[rollout.Trajectory, conditioning.Conditioning]] = []
            terms: list[dict[str, Array]] = []
            videos: list[Array] = []
            for begin in range(0, sampling.rows, config.rows_per_call):
                chunk = slice(begin, begin + config.rows_per_call)
                condition, start_keys, row_keys, (faces, face_mask) = (rows(tree, chunk) for tree in (asked, starts, noise, people))
                trajectory = rollout.sample(actor, state.params, base, condition, negative, schedule, start_keys, row_keys, draws)
                frames = condition.frame_mask.shape[1] - config.data.max_people
                video = rollout.decode(vae, trajectory.x[-1], condition.references, frames)
                terms.append(reward.score_terms(video, faces, face_mask))
                chunks.append((trajectory, condition))
                if len(videos) < SHOWN:
                    videos.append(video[:SHOWN])
            values = {name: np.concatenate([np.asarray(term[name]) for term in terms]) for name in terms[0]}
            clock.append(time.monotonic())

            # Advantages over whole groups, then one optimizer step per share of the rollout.
            rewards = values.pop("reward")
            advantage = grpo.advantages(
                rewards, of_row, eps=config.grpo.advantage_eps, clip=config.grpo.advantage_clip, global_std=config.grpo.global_std
            ).reshape(len(chunks), -1)
            share = len(chunks) // config.grpo.updates
            logged: list[dict[str, Array]] = []
            for number in range(config.grpo.updates):
                part = slice(number * share, (number + 1) * share)
                trajectory, condition = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks[part])
                batch = Rollout(trajectory=trajectory, conditioning=condition, advantage=advantage[part])
                step = jnp.int32(done * config.grpo.updates + number)
                state, scalars = update(objective, state, base, negative, batch, schedule, jnp.asarray(trained), step)
                logged.append(scalars)
            state = state.replace(step=state.step + 1)
            scalars = {name: float(value) for name, value in jax.device_get(logged[0]).items()}
            clock.append(time.monotonic())

            # What happened: the ratio is that of the first update, which is on-policy.
            seconds = np.diff(clock)
            row = group_statistics(rewards, sampling.group) | {name: float(value.mean()) for name, value in values.items()}
            row |= scalars | {"advantage_std": float(advantage.std()), "seconds_rollout": seconds[0], "seconds_update": seconds[1]}
            row["videos_per_hour"] = 3600 * sampling.rows / float(seconds.sum())
            writer.write(done, row)
            done += 1
            show(done, {"reward": row["reward"], "kl": row.get("kl", 0.0), "ratio": row["ratio_max"]})
            if config.run.sample_every and (done % config.run.sample_every == 0 or done == 1) and jax.process_index() == 0:
                write_samples(workdir / "samples" / f"{done:06d}", np.concatenate([np.asarray(video) for video in videos]), chosen, config)
            stop = stopping()
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
