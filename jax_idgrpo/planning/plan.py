"""What a run needs on a machine that one does not have: its programs, compiled by the real compiler for a named topology.

Every program of a training step (text encoder, rollout, decode, reward, update) and of the evaluation is lowered from shapes alone on a
mesh of the topology's devices and compiled; nothing is allocated or run. Reported per program:

    memory        the compiler's: arguments, results that take no argument's place, and temporaries, per chip
    FLOPs         of the traced program: products and convolutions, loop bodies times their trips, recomputation included, over the chips
    bytes moved   of the compiled program: what every instruction reads and writes in HBM, loop bodies times their trips
    collectives   of the compiled program: bytes that the collectives bring to a chip
    time          max(FLOPs / peak, bytes / HBM bandwidth) + collectives / link bandwidth; a bound from below, which assumes kernels
                  at the chip's peak, arithmetic and HBM at the same time, and collectives with nothing beside them

The compiler's own cost analysis counts a loop body once, which is why programs are counted here.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from checkpoints_convert import checkpoint
from jax_idgrpo import rng
from jax_idgrpo.config import Config, MeshConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.commands import evaluated, make_reward
from jax_idgrpo.models.attention import fused
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.models.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, VAEConfig, WanVAE
from jax_idgrpo.models.wan import WanConfig, WanTransformer, vace_1_3b, vace_14b, wan_1_3b, wan_14b
from jax_idgrpo.optimizer import make_optimizer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning.cost_model import flops, traffic
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.conditioning import MASK_CHANNELS, Conditioning
from jax_idgrpo.training import update
from jax_idgrpo.training.checkpoint import write_text
from jax_idgrpo.training.state import start

SIZES: dict[str, dict[str, Callable[..., WanConfig]]] = {
    "1.3b": {"vace": vace_1_3b, "phantom": wan_1_3b},
    "14b": {"vace": vace_14b, "phantom": wan_14b},
}
PUBLISHED_VAE = VAEConfig(
    base_dim=96, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True),
    latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
)
PUBLISHED_TEXT_ENCODER = UMT5Config(d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24, vocab_size=256_384)
LATENT_CHANNELS = 16
SPARE = 0.1     # of a chip's memory that a program should leave


# ---- the machine ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip has: bytes of memory, bfloat16 FLOP/s, bytes/s of its memory and of its links together."""

    memory: float
    flops: float
    bandwidth: float
    links: float


# By JAX's name of the device. Published figures: cloud.google.com/tpu/docs/system-architecture-tpu-vm, NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(32e9, 275e12, 1.23e12, 300e9),
    "TPU v5 lite": Chip(16e9, 197e12, 0.82e12, 200e9),
    "TPU v5": Chip(95e9, 459e12, 2.77e12, 600e9),
    "TPU v6 lite": Chip(32e9, 918e12, 1.64e12, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 312e12, 2.04e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 989e12, 3.35e12, 450e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4.8e12, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the GPU compiler asks of a device that is not here, beside what its `Chip` says; sizes in bytes."""

    device: str     # JAX's name of it
    capability: str
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory_per_core: int


# Figures: openxla/xla, xla/backends/gpu/target_config/specs.
HOPPER = ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 52_428_800, 233_472)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 1.41, 41_943_040, 167_936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *HOPPER),
    "h200": Gpu("NVIDIA H200", *HOPPER),
}

# The compiler times its own kernels for a product against cuBLAS's on the device; without one, cuBLAS's are taken.
ABSENT_GPU = {"xla_gpu_enable_triton_gemm": False}


def _target(gpu: Gpu) -> str:
    """The GPU compiler's description of a device (a text of its `GpuTargetConfigProto`)."""
    chip = CHIPS[gpu.device]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core} clock_rate_ghz: {gpu.clock_ghz}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory_per_core}
          shared_memory_per_block_optin: {gpu.shared_memory_per_core - 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          l2_cache_size: {gpu.l2_cache} device_memory_size: {chip.memory:.0f} memory_bandwidth: {chip.bandwidth:.0f}
          cuda_compute_capability {{ {gpu.capability} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{gpu.device}"
    """


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology: "v5p:4x4x4" and the like for TPUs, "h200:8" or "h200:4x8" for 8 GPUs or 4 hosts of 8, "cpu:8" for
    virtual CPU devices, "gpu" for this machine's.

    Raises:
      UserError: there is no such topology, or what it needs is not here.
    """
    name, _, shape = topology.partition(":")
    if name == "cpu":
        return _cpus(topology, shape)
    if name in GPUS:
        return _gpus(topology, GPUS[name], shape)
    if name == "gpu":
        try:
            return jax.devices("gpu")
        except RuntimeError:
            raise UserError(
                "--topology gpu: JAX finds no GPU here; install the cuda extra on a machine that has one, or name GPUs, as in h200:8"
            ) from None
    return _tpus(topology)


def _cpus(topology: str, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"[1-9]\d*", shape):
        raise UserError(f"--topology {topology}: cpu takes a number of devices, as in cpu:8")
    with contextlib.suppress(RuntimeError):     # JAX has started: it has the devices that it has
        jax.config.update("jax_num_cpu_devices", int(shape))
    here = jax.devices("cpu")
    if len(here) < int(shape):
        raise UserError(f"--topology {topology}: JAX has started with {len(here)} CPU devices; plan in a process of its own")
    return here[: int(shape)]


def _gpus(topology: str, gpu: Gpu, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise UserError(f"--topology {topology}: GPUs take a number, or hosts x GPUs of each, as in h200:8 or h200:4x8")
    from jax.experimental import topologies

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")     # else the compiler says several times that there is no driver
    jax.config.update("jax_platforms", "cpu")     # with this the plugin does not look for a GPU before it compiles
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_target(gpu), topology=f"1x{shape}" if "x" in shape else f"1x1x{shape}"
        ).devices
        tokens = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
        jax.eval_shape(functools.partial(fused, lengths=None, implementation="cudnn"), tokens, tokens, tokens)   # wants cuDNN
    except RuntimeError as error:
        raise UserError(
            f"--topology {topology}: no GPU compiler with cuDNN is installed; pip install 'jax-idgrpo[cuda]' (JAX says: {error})"
        ) from None
    return found


# Where libtpu would run, if it ran; it complains when it finds none.
NOWHERE = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def _tpus(topology: str) -> list[jax.Device]:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"     # this machine need not be a TPU's
    for name, value in NOWHERE.items():
        os.environ.setdefault(name, value)
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"     # only one process may hold a TPU, but several may compile
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(f"--topology {topology}: the TPU compiler is not installed; pip install 'jax-idgrpo[tpu]'") from None
        raise UserError(
            f"--topology {topology}: no such slice; use one such as v5e:4x4, v6e:8x8, v5p:4x4x4, h200:8, cpu:8, or gpu"
        ) from None


# ---- the networks --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Networks:
    """Configurations of the video model's parts."""

    transformer: WanConfig
    vae: VAEConfig
    text_encoder: UMT5Config


def networks(config: Config, sizes: str | None) -> Networks:
    """The networks of the checkpoint that the configuration names, or, where it is not on this machine, of published `sizes`.

    Raises:
      UserError: there is no checkpoint and no sizes, or the sizes are unknown.
    """
    folder, model = config.model.folder(), config.model
    run = {"rank": model.rank, "alpha": model.alpha, "remat": model.remat, "unroll": model.unroll}
    if sizes is not None:
        if sizes not in SIZES:
            raise UserError(f"--sizes {sizes}: unknown; choose {' or '.join(SIZES)}, or leave it out and name a checkpoint in model.path")
        return Networks(SIZES[sizes][model.kind](**run), PUBLISHED_VAE, PUBLISHED_TEXT_ENCODER)
    if not folder.is_dir():
        raise UserError(f"model.path {folder}: no such folder; pass --sizes {' or '.join(SIZES)} to plan for published sizes without it")
    transformer, vae, text_encoder = (checkpoint.open_part(folder, part).config for part in ("transformer", "vae", "text_encoder"))
    return Networks(dataclasses.replace(transformer, **run), vae, text_encoder)


# ---- the programs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes that it is called with.

    beside: bytes per chip that lie in memory while it runs. calls: in one training step, 0 for those of the evaluation.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    beside: float
    calls: int


def _on(sharding: Any, tree: Any) -> Any:
    """The shapes of a tree with a sharding, one for all leaves or one each."""
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, jax.sharding.Sharding) else sharding
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, shardings)


def _bytes(*trees: Any) -> float:
    """Bytes per chip of shapes with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(trees)))


def _conditioning(config: Config, rows: int, text_width: int) -> Conditioning:
    video, people, vace = config.video, config.data.max_people, config.model.kind == "vace"
    frames = (video.frames - 1) // FRAMES_PER_LATENT + 1 + (people if vace else 0)

    def latents(frames: int, channels: int) -> jax.ShapeDtypeStruct:
        shape = (rows, frames, video.height // PIXELS_PER_LATENT, video.width // PIXELS_PER_LATENT, channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return Conditioning(
        text=jax.ShapeDtypeStruct((rows, config.data.text_length, text_width), jnp.float32),
        control=latents(frames, 2 * LATENT_CHANNELS + MASK_CHANNELS) if vace else None,
        frame_mask=jax.ShapeDtypeStruct((rows, frames), jnp.bool),
        references=jax.ShapeDtypeStruct((rows,), jnp.int32),
        tail=None if vace else latents(people, LATENT_CHANNELS),
    )


def _trajectory(asked: Conditioning, steps: int) -> rollout.Trajectory:
    rows = len(asked.references)

    def latents(*leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *leading, *asked.latent_shape), jnp.float32)

    log_prob = jax.ShapeDtypeStruct((rows, steps), jnp.float32)
    return rollout.Trajectory(latents=latents(), x=latents(steps + 1), velocity=latents(steps), log_prob=log_prob)


def programs(config: Config, parts: Networks, mesh: Mesh) -> Iterator[Program]:
    """The programs of a training step and of the evaluation, in the order in which they run.

    Raises:
      UserError: the configuration does not fit the mesh, or trains in a way that is not planned.
    """
    if not config.grpo.replays:
        raise UserError(f"plan: grpo.objective {config.grpo.objective} is not planned, only those on replayed steps are; leave it out")
    if config.reward.backend:
        raise UserError(f"plan: reward.backend {config.reward.backend} runs on the host and is not planned; leave it out")
    count, sampling = config.rows_per_call, config.rollout
    sharding.check_rows(mesh, count, "rows of one program call (rollout.micro_batch)")
    whole, rows, stacked = sharding.replicated(mesh), sharding.batch_sharding(mesh), sharding.batch_sharding(mesh, 1)
    dtypes, people = Dtypes.named(config.model.dtype), config.data.max_people

    # ---- what lies in memory -------------------------------------------------------------------------------------------
    network = dataclasses.replace(parts.transformer, mesh=mesh)
    transformer = nnx.eval_shape(lambda: WanTransformer(network, dtypes=dtypes, rngs=nnx.Rngs(0)))
    actor, lora, base = policy.split(transformer, sampling.guidance, config.image_guidance())
    optimizer = make_optimizer(config.optimizer, config.run.steps * config.grpo.optimizer_steps)
    base = _on(sharding.state_shardings(mesh, base), base)
    state = jax.eval_shape(lambda lora: start(optimizer, lora), lora)
    state = _on(sharding.state_shardings(mesh, state), state)
    vae_graph, decoder = nnx.split(nnx.eval_shape(lambda: WanVAE(parts.vae, rngs=nnx.Rngs(0))))
    decoder = _on(whole, decoder)
    text_graph, encoder = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(parts.text_encoder, dtypes=dtypes, rngs=nnx.Rngs(0))))
    encoder = _on(sharding.spread(mesh, encoder), encoder)
    reward = make_reward(config.reward)
    scorer = _on(whole, reward.state)
    waiting = _bytes(encoder) if config.model.text_memory == "device" else 0.0
    resident = _bytes(base, state, decoder, scorer) + waiting
    width = parts.text_encoder.d_model
    negative = jax.ShapeDtypeStruct((config.data.text_length, width), jnp.float32, sharding=whole)

    def schedule(steps: int, *chosen: Any) -> Any:
        return _on(whole, rollout.Schedule.make(steps, sampling.shift or 3.0, *chosen))

    def row_keys(rows: int) -> Any:
        return jax.eval_shape(lambda: rng.row_keys(rng.key(0, "noise"), jnp.zeros(rows, int), jnp.zeros(rows, int)))

    asked = _conditioning(config, count, width)
    trajectory = _trajectory(asked, sampling.trained_steps)
    chunk = (trajectory, asked)
    chunks = sampling.rows // count
    stored = _bytes(_on(rows, chunk)) * chunks
    asked, trajectory = _on(rows, asked), _on(rows, trajectory)

    # ---- what runs -----------------------------------------------------------------------------------------------------
    ids = jax.ShapeDtypeStruct((1, config.data.text_length), jnp.int32, sharding=whole)
    encode = jax.jit(lambda state, ids, mask: nnx.merge(text_graph, state)(ids, mask))
    yield Program("text encoder", encode, (encoder, ids, ids), {}, resident - waiting, sampling.prompts)

    starts = _on(rows, row_keys(count))
    first = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows)
    window = rollout.Window(start=first, size=sampling.trained_steps, final_noise=sampling.final_step == "sde")
    course = schedule(sampling.steps, sampling.sampler, sampling.noise_level)
    given: tuple[Any, ...] = (actor, state.params, base, asked, negative, course, starts, starts, window)
    yield Program("rollout", rollout.sample, given, {}, resident - _bytes(state.params, base) + stored, chunks)

    def decoding(name: str, latents: Any, asked: Conditioning, beside: float, calls: int) -> Program:
        given = ((vae_graph, decoder), latents, asked.references)
        return Program(name, rollout.decode, given, {"frames": asked.video_frames(people)}, beside, calls)

    yield decoding("decode", trajectory.latents, asked, resident - _bytes(decoder) + stored, chunks)

    size = config.video
    video = jax.ShapeDtypeStruct((count, size.frames, size.height, size.width, 3), jnp.float32, sharding=rows)
    faces = _on(rows, reward.shapes(count, people))
    present = jax.ShapeDtypeStruct((count, people), jnp.bool, sharding=rows)
    beside = resident - _bytes(scorer) + stored
    yield Program("reward", reward.function, (scorer, video, faces, present), {}, beside, chunks)

    number = config.trained_rows // config.grpo.updates // count
    values = jax.ShapeDtypeStruct((number, count), jnp.float32)

    def stack(tree: Any) -> Any:
        return _on(stacked, jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype), tree))

    batch = update.Rollout(
        trajectory=stack(trajectory), conditioning=stack(asked), start=stack(first), advantage=_on(stacked, values),
        weight=_on(stacked, values), noise=stack(starts),
    )
    objective = update.Objective(policy=actor, grpo=config.grpo, optimizer=optimizer, ema_decay=config.optimizer.ema_decay)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    trained: tuple[Any, ...] = (objective, state, update.Networks(base=base, negative=negative), batch, course, step)
    beside = resident - _bytes(state, base) + _bytes(batch) * (config.grpo.updates - 1)
    yield Program("update", update.update, trained, {}, beside, config.grpo.optimizer_steps)

    # ---- evaluation ----------------------------------------------------------------------------------------------------
    count = sharding.rows_for(mesh, config.evaluate.batch)
    asked = _on(rows, _conditioning(evaluated(config), count, width))
    x = jax.ShapeDtypeStruct((count, *asked.latent_shape), jnp.float32, sharding=rows)
    given = (actor, state.params, base, asked, negative, schedule(config.evaluate.steps), x)
    yield Program("evaluation: sample", rollout.denoise, given, {}, resident - _bytes(state.params, base), 0)
    yield decoding("evaluation: decode", x, asked, resident - _bytes(decoder), 0)


# ---- the plan ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """A program on a chip: bytes of memory at its peak (None where the compiler found no room), and what it does per call.

    seconds and utilisation are None on machines whose speed is not known; see the module's docstring for how they are estimated.
    """

    program: str
    calls: int
    peak: float | None
    fits: bool
    flops: float
    moved: float
    received: float
    seconds: float | None
    utilisation: float | None
    compile_seconds: float
    program_bytes: int
    note: str = ""


def measure(program: Program, mesh: Mesh, chip: Chip | None, options: dict[str, Any] | None = None) -> Cost:
    """Compile one program, with the compiler's `options`, and count it."""
    began = time.monotonic()
    traced = program.function.trace(*program.arguments, **program.options)
    arithmetic = flops(traced.jaxpr) / mesh.size
    lowered = traced.lower()
    size = len(lowered.as_text())
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"Used ([\d.]+[KMG]) of ([\d.]+[KMG]) hbm", str(error))
        note = f"wants {wanted[1]} of {wanted[2]}" if wanted else "does not fit"
        seconds = time.monotonic() - began
        return Cost(program.name, program.calls, None, False, arithmetic, math.nan, math.nan, None, None, seconds, size, note)
    seconds = time.monotonic() - began
    found, memory = traffic(compiled.as_text()), compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    peak = own + program.beside
    expected = utilisation = None
    if chip is not None:
        expected = max(arithmetic / chip.flops, found.moved / chip.bandwidth) + found.received / chip.links
        utilisation = arithmetic / chip.flops / expected
    fits = chip is None or peak <= (1 - SPARE) * chip.memory
    return Cost(
        program.name, program.calls, peak, fits, arithmetic, found.moved, found.received, expected, utilisation, seconds, size
    )


def meshes(count: int, parts: Networks, share: int) -> Iterator[tuple[MeshConfig, int]]:
    """Meshes of `count` devices with rows per call that fit a `share` of rows and the network, the simplest first.

    Simple is: few devices on one row, whole heads, and few rows at a time.
    """
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    found = []
    for seq, tensor, data in itertools.product(powers, powers, powers):
        fsdp, rest = divmod(count, seq * tensor * data)
        heads = parts.transformer.num_heads
        if rest or fsdp == 0 or heads % tensor or parts.transformer.ffn_dim % tensor or seq * tensor > heads:
            continue
        for rows in (data * fsdp, 2 * data * fsdp, 4 * data * fsdp):
            if share % rows == 0:
                found.append((MeshConfig(data=data, fsdp=fsdp, seq=seq, tensor=tensor), rows))
    order = sorted(found, key=lambda pair: (pair[0].seq * pair[0].tensor, pair[0].tensor, pair[0].data, pair[1]))
    return iter(order)


def plan(config: Config, topology: str, sizes: str | None, out: Path, wanted: Sequence[str] = (), search: int = 0) -> bool:
    """Compile the programs (all, or those `wanted`), print them as a table, and write `plan.json` and `table.md` into `out`.

    search: how many meshes and micro-batches to try on rollout and update before the rest is compiled on the fastest that fits.
    Returns whether every program leaves a tenth of the memory free.

    Raises:
      UserError: the topology, the sizes or the mesh cannot be.
    """
    found = devices(topology)
    parts = networks(config, sizes)
    chip = CHIPS.get(found[0].device_kind)
    options = ABSENT_GPU if topology.partition(":")[0] in GPUS else None
    tried: list[dict[str, Any]] = []
    if search:
        share = config.trained_rows // config.grpo.updates
        for chosen, rows in itertools.islice(meshes(len(found), parts, share), search):
            candidate = dataclasses.replace(config, mesh=chosen, rollout=dataclasses.replace(config.rollout, micro_batch=rows))
            mesh = sharding.make_mesh(chosen, found)
            costs = [measure(each, mesh, chip, options) for each in programs(candidate, parts, mesh) if each.name in ("rollout", "update")]
            tried.append({"mesh": dataclasses.asdict(chosen), "micro_batch": rows, "costs": [dataclasses.asdict(cost) for cost in costs]})
            total = sum(cost.calls * (cost.seconds or math.inf) for cost in costs)
            tried[-1] |= {"fits": all(cost.fits for cost in costs), "seconds_per_step": total, "config": candidate}
            print(f"mesh {_sizes(mesh)}, micro-batch {rows}: {'fits' if tried[-1]['fits'] else 'does not fit'}, {total:.0f} s per step")
        fitting = [trial for trial in tried if trial["fits"]]
        if not fitting:
            raise UserError(f"plan: none of the {len(tried)} meshes tried on {topology} fits; search more, or choose a larger slice")
        config = min(fitting, key=lambda trial: trial["seconds_per_step"])["config"]
    mesh = sharding.make_mesh(config.mesh, found)
    costs = []
    for program in programs(config, parts, mesh):
        if not wanted or program.name in wanted:
            costs.append(measure(program, mesh, chip, options))
            print(row(costs[-1]), flush=True)
    heading = (
        f"{topology}, {len(found)} x {found[0].device_kind}, mesh {_sizes(mesh)}, {config.rows_per_call} rows per call, "
        f"remat {config.model.remat}, {config.model.dtype}"
    )
    table = "\n".join([heading, "", *HEADER, *(row(cost) for cost in costs), "", *summary(config, costs, chip)])
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "topology": topology, "device": found[0].device_kind, "devices": len(found), "chip": chip and dataclasses.asdict(chip),
        "mesh": dict(mesh.shape), "config": json.loads(config.to_json()), "programs": [dataclasses.asdict(cost) for cost in costs],
        "tried": [{name: value for name, value in trial.items() if name != "config"} for trial in tried],
    }
    write_text(out / "plan.json", json.dumps(record, indent=2))
    write_text(out / "table.md", table + "\n")
    print(table)
    return all(cost.fits for cost in costs)


HEADER = (
    "| program | calls per step | peak per chip | TFLOP | moved | received | estimate | utilisation | compiled in |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(cost: Cost) -> str:
    """One line of the table."""
    peak = cost.note if cost.peak is None else f"{cost.peak / 1e9:.1f} GB{'' if cost.fits else ' (does not fit)'}"
    speed = ["-", "-"] if cost.seconds is None else [f"{cost.seconds:.2f} s", f"{cost.utilisation:.0%}"]
    traffic = [f"{cost.moved / 1e9:.1f} GB", f"{cost.received / 1e9:.1f} GB"]
    cells = [cost.program, f"{cost.calls:g}", peak, f"{cost.flops / 1e12:.1f}", *traffic, *speed, f"{cost.compile_seconds:.0f} s"]
    return f"| {' | '.join(cells)} |"


def summary(config: Config, costs: Sequence[Cost], chip: Chip | None) -> list[str]:
    """What the table says about a training step, and what it assumes."""
    if chip is None:
        return ["All figures per chip and call. The speed of this device is not known, so times are not estimated."]
    lines = [
        f"All figures per chip and call. Memory {chip.memory / 1e9:g} GB, of which {1 - SPARE:.0%} may be taken. Estimates assume "
        f"{chip.flops / 1e12:g} TFLOP/s, {chip.bandwidth / 1e12:g} TB/s of memory beside it, and {chip.links / 1e9:g} GB/s of links after "
        "it: a bound from below.",
    ]
    seconds = {cost.program: cost.calls * cost.seconds for cost in costs if cost.calls and cost.seconds is not None}
    if {"rollout", "update"} <= set(seconds):
        total = sum(seconds.values())
        rate = 3600 * config.rollout.rows / total
        lines.append(f"A training step of {config.rollout.rows} videos: {total:.0f} s, {rate:.0f} videos per hour.")
    return lines


def _sizes(mesh: Mesh) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "of one device"
