"""Describe the programs of a training step and of the evaluation by the shapes of their arguments.

The shapes of networks and state come from `training.setup.build`, which also sets up real runs.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from checkpoints_convert.experts import BOUNDARY
from jax_idgrpo import flow
from jax_idgrpo.config import Config, VideoConfig
from jax_idgrpo.config.model_kinds import REFERENCE_KINDS
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.sampler import evaluated
from jax_idgrpo.models import experts
from jax_idgrpo.models.umt5 import UMT5Config
from jax_idgrpo.models.vae import PIXELS_PER_LATENT, VAEConfig
from jax_idgrpo.models.wan import WanConfig, vace_1_3b, vace_14b, wan_1_3b, wan_14b
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.sharding import shapes
from jax_idgrpo.planning.arguments import (
    chip_bytes,
    conditioning_of,
    keys_of,
    resident,
    rows_of,
    scored,
    shares_devices,
    stacked,
    video_of,
    whole,
)
from jax_idgrpo.rewards.base import differentiable
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.planned import (
    HostReward,
    Planned,
    encoded_shapes,
    planned_assigner,
    planned_judge,
)
from jax_idgrpo.rewards.recognition import Assigner, judge_program
from jax_idgrpo.rewards.vlm.reward import VlmReward
from jax_idgrpo.sampling import rollout
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.pipeline import Architecture, read_architecture
from jax_idgrpo.sampling.policy import PolicyInputs
from jax_idgrpo.training import setup, update
from jax_idgrpo.training.setup import Run

SIZES: dict[str, dict[str, Callable[..., WanConfig]]] = {
    "1.3b": dict.fromkeys(REFERENCE_KINDS, wan_1_3b) | {"vace": vace_1_3b},
    "14b": dict.fromkeys(REFERENCE_KINDS, wan_14b) | {"vace": vace_14b},
    "a14b": {"vace": vace_14b},
}
TWO_EXPERTS = "a14b"  # sizes with two transformers of equal sizes, as in Wan 2.2
PUBLISHED_VAE = VAEConfig(
    base_dim=96,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)
PUBLISHED_TEXT_ENCODER = UMT5Config(
    d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24, vocab_size=256_384
)


# ---- the networks --------------------------------------------------------------------------------


def networks(config: Config, sizes: str | None) -> Architecture:
    """Return the architecture of published `sizes`, or of the checkpoint if `sizes` is None.

    Raises:
      UserError: the sizes are unknown, or there are neither sizes nor a checkpoint.
    """
    folder, model = config.model.folder(), config.model
    if sizes is not None:
        if model.kind not in SIZES.get(sizes, {}):
            known = " or ".join(name for name, kinds in SIZES.items() if model.kind in kinds)
            raise UserError(
                f"--sizes {sizes}: unknown for model.kind {model.kind}; choose {known}, or leave it "
                "out and name a checkpoint in model.path"
            )
        return Architecture(
            SIZES[sizes][model.kind](),
            PUBLISHED_VAE,
            PUBLISHED_TEXT_ENCODER,
            boundary=BOUNDARY if sizes == TWO_EXPERTS else None,
        )
    if not folder.is_dir():
        raise UserError(
            f"model.path {folder}: no such folder; pass --sizes {' or '.join(SIZES)} to plan for "
            "published sizes without it"
        )
    return read_architecture(folder)


# ---- the programs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes of its arguments.

    Attributes:
      name: name in the table.
      function: the jitted function.
      arguments: shapes of the positional arguments.
      devices: number of devices that share the work.
      beside: bytes per chip in memory during a call, besides the arguments.
      calls: calls per training step with empty caches, on average; 0 for programs of the evaluation
        and for programs that run once.
      options: keyword arguments.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    devices: int
    beside: float
    calls: int | float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def programs(config: Config, parts: Architecture, mesh: Mesh) -> Iterator[Program]:
    """Iterate over the programs of a training step and of the evaluation, in order of execution.

    Args:
      config: the run.
      parts: networks of the video model.
      mesh: devices of the video model, which need not exist on this machine.

    Raises:
      UserError: the configuration does not fit the mesh, or a network cannot be used.
    """
    sharding.check_rows(
        mesh, config.rows_per_call, "rows of one program call (rollout.micro_batch)"
    )
    run = setup.build(config, mesh, abstract=True, architecture=parts)
    judge = planned_judge(config, mesh)
    assigner = None if judge is None else planned_assigner(config, run.reward, mesh)
    further = [scorer for scorer in (judge, assigner) if scorer not in (None, run.reward)]
    held = resident(run, further)
    yield _text_encoder(run, held)
    yield from _photo_encoding(run, config.video, held, "")
    yield from _reference_photo(run, run.reward, "reference photo", held)

    # ---- a training step -------------------------------------------------------------------------
    chunk, video = _chunk(run), video_of(run, config.video, config.rows_per_call)
    count = config.rollout.rows // config.rows_per_call
    stored = stacked(run, chunk, count)
    # The previous chunk is in memory until it is scored, while the next one is sampled.
    beside = held + chip_bytes(chunk, video, stored)
    yield from _sampling(run, chunk.trajectory, beside, count)
    latents = chunk.trajectory.latents
    own = chip_bytes(run.vae, latents)
    yield _decoding(run, "decode", latents, chunk.conditioning, beside - own, count)
    yield _storing(run, stored, chunk, held + chip_bytes(video), count)
    yield from _scoring(run, run.reward, "reward", video, beside, count)
    if config.trained_rows < config.rollout.rows:
        yield _selecting(run, stored, held)
    yield from _updating(run, chunk, held)

    # ---- evaluation ------------------------------------------------------------------------------
    if not config.run.watch_every:
        held += chip_bytes(*(scorer.state for scorer in further))
    yield from _evaluation(run, judge, assigner, held)


def holdings(config: Config, parts: Architecture, mesh: Mesh) -> dict[str, float]:
    """Return the bytes per chip that training takes for the transformer, by purpose.

    Args:
      config: the run.
      parts: networks of the video model.
      mesh: devices of the video model, which need not exist on this machine.
    """
    run = setup.build(config, mesh, abstract=True, architecture=parts)
    trained = chip_bytes(run.state.params)
    return {
        "frozen weights": chip_bytes(run.base),
        "trained parameters": trained,
        "gradient": trained,
        "optimizer moments": chip_bytes(run.state.optimizer),
        "moving average": chip_bytes(run.state.ema),
        "reference": chip_bytes(run.reference),
    }


def _chunk(run: Run) -> update.Rollout:
    """Return the shapes that a training step stores of one call of its rollout."""
    config, given = run.config, _sampled(run)
    fetched = dataclasses.replace(given[0], base=sharding.fetched(run.base))
    function = functools.partial(setup.sample, config, run.policy)
    trajectory = rows_of(run, jax.eval_shape(function, fetched, *given[1:]))
    asked = given[0].conditioning
    people, count, size = None, config.rows_per_call, config.video
    if config.grpo.through_reward:
        people = rows_of(
            run,
            encoded_shapes(
                run.reward, count, config.data.max_people, (size.frames, size.height, size.width)
            ),
        )
    start = rows_of(run, jax.ShapeDtypeStruct((count,), jnp.int32))
    return update.Rollout(
        trajectory=trajectory,
        conditioning=asked,
        start=start,
        noise=keys_of(run, count),
        people=people,
    )


# ---- one program each ----------------------------------------------------------------------------


def _text_encoder(run: Run, held: float) -> Program:
    """Encode one prompt. The encoder is on the devices for the call, wherever it is stored."""
    graph, state = nnx.split(run.pipe.text_encoder)
    state = shapes(state, sharding.fully_shard(run.mesh, state))
    waiting = chip_bytes(state) if run.config.model.text_memory == "device" else 0.0
    ids = whole(run, 1, run.config.data.text_length, dtype=jnp.int32)
    encode = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))
    return Program(
        "text encoder",
        encode,
        (state, ids, ids),
        run.mesh.size,
        held - waiting,
        run.config.rollout.prompts,
    )


def _photo_encoding(run: Run, size: VideoConfig, held: float, prefix: str) -> Iterator[Program]:
    """Encode one photo, and for VACE the blank video, on every device."""
    graph, state = run.vae

    def encode(state: nnx.State, video: jax.Array) -> jax.Array:
        network, (_, frames, height, width, _) = nnx.merge(graph, state), video.shape
        cells = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
        return network.encode(video, network.chunk(flow.latent_frames(frames), *cells))

    function, beside = jax.jit(encode), held - chip_bytes(state)
    photos = 0 if prefix else run.config.rollout.prompts * run.config.data.max_people
    yield Program(
        f"{prefix}photo encoding",
        function,
        (state, whole(run, 1, 1, size.height, size.width, 3)),
        1,
        beside,
        photos,
    )
    if run.config.model.kind == "vace":
        video = whole(run, 1, size.frames, size.height, size.width, 3)
        yield Program(f"{prefix}blank video", function, (state, video), 1, beside, 0)


def _reference_photo(run: Run, reward: Planned, name: str, held: float) -> Iterator[Program]:
    """Detect and embed the face of one reference photo, and describe its person, on every device."""
    if not isinstance(reward, FaceReward):
        return
    photos = (
        0
        if name.startswith("evaluation")
        else run.config.rollout.prompts * run.config.data.max_people
    )
    picture, face = (shapes(each, sharding.replicated(run.mesh)) for each in reward.photo_shapes())
    beside = held - chip_bytes(reward.state)
    yield Program(f"{name}: find", reward.find, (reward.state, picture), 1, beside, photos)
    yield Program(f"{name}: embed", reward.embed, (reward.state, *face), 1, beside, photos)
    if (region := reward.person_shape()) is not None:
        given = reward.state, shapes(region, sharding.replicated(run.mesh))
        yield Program(f"{name}: whole person", reward.describe, given, 1, beside, photos)


def _sampled(run: Run) -> tuple[Any, ...]:
    """Return the shapes of the arguments that sample one chunk, with all experts."""
    config, count = run.config, run.config.rows_per_call
    asked, keys = conditioning_of(run, config, count), keys_of(run, count)
    window = rollout.Window(
        start=rows_of(run, jax.ShapeDtypeStruct((count,), jnp.int32)),
        size=config.rollout.trained_steps,
        final_noise=config.rollout.final_step == "sde",
    )
    inputs = PolicyInputs(run.state.params, run.base, asked, run.negative)
    return inputs, run.schedule, keys, keys, window


def _named(run: Run, name: str, expert: int) -> str:
    """Return the name of a program that runs one expert."""
    if len(run.schedule.counts) == 1:
        return name
    return f"{name}: {experts.NAMES[expert].replace('_', ' ')}"


def _own(run: Run, expert: int) -> float:
    """Return the bytes per chip of an expert's adapter and base while it does not run."""
    return chip_bytes(experts.each(run.state.params)[expert], experts.each(run.base)[expert])


def _sampling(
    run: Run, trajectory: rollout.Trajectory, beside: float, calls: int
) -> Iterator[Program]:
    """Sample one chunk of the rollout for the objective, with one expert after the other.

    `beside` is in bytes per chip, and includes all experts.
    """
    inputs, *rest = _sampled(run)
    if len(run.schedule.counts) == 1:
        function = jax.jit(functools.partial(setup.sample, run.config, run.policy))
        own = beside - _own(run, 0)
        yield Program("rollout", function, (inputs, *rest), run.mesh.size, own, calls)
        return
    for expert in run.schedule.experts:
        first = expert == run.schedule.experts[0]
        yield Program(
            _named(run, "rollout", expert),
            rollout.sample,
            (run.policy.of(expert), inputs.of(expert), *rest),
            run.mesh.size,
            beside - _own(run, expert),
            calls,
            {"so_far": None if first else trajectory, "expert": expert},
        )


def _decoding(
    run: Run,
    name: str,
    latents: jax.ShapeDtypeStruct,
    asked: Conditioning,
    beside: float,
    calls: int,
) -> Program:
    frames = {"frames": asked.video_frames(run.config.data.max_people)}
    return Program(
        name,
        rollout.decode,
        (run.vae, latents, asked.references),
        run.mesh.size,
        beside,
        calls,
        frames,
    )


def _storing(
    run: Run, stored: update.Rollout, chunk: update.Rollout, beside: float, calls: int
) -> Program:
    """Write a chunk into the stored rollout."""
    write = jax.jit(functools.partial(update.store, chunks=calls), donate_argnums=0)
    return Program(
        "store", write, (stored, chunk, whole(run, dtype=jnp.int32)), run.mesh.size, beside, calls
    )


def _scoring(
    run: Run, reward: Planned, name: str, video: jax.ShapeDtypeStruct, beside: float, calls: int
) -> Iterator[Program]:
    """Score one batch by the reward. A reward on the host has no program.

    `beside` is in bytes per chip, and includes the networks of `reward` and the video.
    """
    if isinstance(reward, HostReward):
        return
    count, size, mesh = video.shape[0], video.shape[1:4], run.mesh
    if isinstance(reward, VlmReward):
        mesh = reward.mesh or mesh
        step = min(reward.rows or count, count)
        calls, count = calls * -(-count // step), sharding.rows_for(mesh, step)
    where = sharding.batch_sharding(mesh)
    encoded = shapes(encoded_shapes(reward, count, run.config.data.max_people, size), where)
    scored = shapes(jax.ShapeDtypeStruct((count, *video.shape[1:]), video.dtype), where)
    beside = beside - chip_bytes(reward.state, video) if shares_devices(run, reward) else 0.0
    yield Program(
        name, jax.jit(reward.apply), (reward.state, scored, encoded), mesh.size, beside, calls
    )


def _selecting(run: Run, stored: update.Rollout, held: float) -> Program:
    """Select the trained rows of a rollout if not all rows are trained."""
    number = len(stored.start)
    sampled = scored(
        run,
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stored),
        number,
    )
    chosen = whole(run, run.config.trained_rows, dtype=jnp.int32)
    return Program(
        "select", update.select_rows, (sampled, chosen, run.mesh), run.mesh.size, held, 1
    )


def _updating(run: Run, chunk: update.Rollout, held: float) -> Iterator[Program]:
    """Take one optimizer step. With two experts, one program per set of trained experts."""
    config, wanted, params = run.config, run.config.grpo, run.state.params
    batch = scored(run, chunk, config.trained_rows // config.rows_per_call)
    old = shapes(
        jax.eval_shape(run.policy.snapshot, params), sharding.state_shardings(run.mesh, params)
    )
    for trained, share in _trained(run).items():
        networks = update.Networks(
            base=experts.together(
                [
                    sharding.fetched(base) if expert in trained else None
                    for expert, base in enumerate(experts.each(run.base))
                ]
            ),
            negative=run.negative,
            reference=run.reference,
            old=None if wanted.replays or wanted.on_policy else old,
            scorer=(run.vae, differentiable(run.reward).state) if wanted.through_reward else None,
        )
        given = (run.rule, run.state, networks, batch, run.schedule, whole(run, dtype=jnp.int32))
        used = [experts.each(run.base)[expert] for expert in trained]
        yield Program(
            _named(run, "update", trained[0]) if len(trained) == 1 else "update",
            update.update,
            given,
            run.mesh.size,
            held - chip_bytes(run.state, used, run.reference, *(networks.scorer or ())),
            wanted.optimizer_steps * share,
            {"trained": trained},
        )


def _trained(run: Run) -> dict[tuple[int, ...], float]:
    """Return the sets of experts that the run's updates train, with their share of the steps."""
    if len(run.schedule.counts) == 1:
        return {(0,): 1.0}
    steps, found = run.config.run.steps, collections.Counter[tuple[int, ...]]()
    for step in range(steps):
        levels = rollout.trained_levels(run.config.rollout, step, run.schedule.counts)
        found[tuple(expert for expert, count in enumerate(levels) if count)] += 1
    return {trained: found[trained] / steps for trained in sorted(found)}


def _judging(
    run: Run,
    judge: FaceReward,
    assigner: FaceReward,
    video: jax.ShapeDtypeStruct,
    beside: float,
) -> Program:
    """Score one batch by the judge, with the faces that the reward's embedder assigns to people.

    Args:
      run: the run.
      judge: the judge.
      assigner: the face reward of that embedder.
      video: shape of the videos.
      beside: bytes per chip, with both networks and the video.
    """
    count, people = video.shape[0], run.config.data.max_people
    where = sharding.batch_sharding(run.mesh)
    known, assigned = (shapes(reward.shapes(count, people), where) for reward in (judge, assigner))
    given = Assigner.make(assigner, assigned.embeddings)
    return Program(
        "evaluation: judge",
        judge_program,
        ((judge.graph, judge.config), judge.state, video, known, given),
        run.mesh.size,
        beside - chip_bytes(judge.state, assigner.state, video),
        0,
    )


def _evaluation(
    run: Run, judge: FaceReward | None, assigner: FaceReward | None, held: float
) -> Iterator[Program]:
    """Sample, decode and score one batch of `evaluate`.

    The videos of the previous batch are still in memory during sampling.

    Args:
      run: the run.
      judge: the judge, if there is one.
      assigner: the face reward whose embedder assigns faces to people; None without a judge.
      held: bytes per chip, with the networks of the judge and the assigner.
    """
    config = evaluated(run.config)
    size, count = config.video, sharding.rows_for(run.mesh, config.evaluate.batch)
    yield from _photo_encoding(run, size, held, "evaluation: ")
    if judge is not None:
        yield from _reference_photo(run, judge, "evaluation: judge's photo", held)
    if assigner is not None and assigner is not run.reward:
        yield from _reference_photo(run, assigner, "evaluation: assigner's photo", held)
    asked, video = conditioning_of(run, config, count), video_of(run, size, count)
    x = rows_of(run, jax.ShapeDtypeStruct((count, *asked.latent_shape), jnp.float32))
    schedule = rollout.Schedule.make(
        config.evaluate.steps,
        config.rollout.shift or 3.0,
        solver=config.evaluate.solver,
        boundary=run.pipe.boundary,
    )
    schedule = shapes(schedule, sharding.replicated(run.mesh))
    actor = run.policy.configured(config, 3.0, evaluation=True)
    inputs = PolicyInputs(run.state.params, run.base, asked, run.negative)
    beside = held + chip_bytes(video)
    state: Any = x
    for expert in schedule.experts:
        given = (actor.of(expert), inputs.of(expert), schedule, state)
        options = {"expert": expert} if len(schedule.counts) > 1 else {}
        name = _named(run, "evaluation: sample", expert)
        own = beside - _own(run, expert)
        yield Program(name, rollout.denoise, given, run.mesh.size, own, 0, options)
        state = rows_of(run, jax.eval_shape(flow.SolverState.start, x))
    yield _decoding(
        run, "evaluation: decode", x, asked, beside + chip_bytes(asked) - chip_bytes(run.vae), 0
    )
    yield from _scoring(run, run.reward, "evaluation: reward", video, held + chip_bytes(video), 0)
    if judge is not None and assigner is not None:
        yield _judging(run, judge, assigner, video, held + chip_bytes(video))
