"""Benchmark the transformer, its LoRA's gradient, a rollout and an update against PyTorch.

The PyTorch side uses diffusers and peft. Both sides load the same random VACE checkpoint and get
the same input. Each has its own process, and they alternate: one waits while the other works. A
turn is two calls, and the second is timed. After a pause, the first call includes the time for
memory that the system reclaimed meanwhile (0.3 of 1.0 s for our gradient), and training does not
pause. The figures are the ratio of medians, ours over theirs, and each process's peak memory. The
rollout and the update use guidance: every velocity is one call on twice the rows. PyTorch's loop is
that of the published recipe: a stochastic step with its log-probability; for every trained step a
replay, the frozen base for the KL term, and backward; one optimizer step at the end. Requires the
`test` extra:

    python benchmarks/transformer.py [--rows 2] [--steps 4] [--rounds 5] [--compile]
    python benchmarks/transformer.py --size 1.3b                    on a GPU, which PyTorch uses too

`--size 1.3b` is the published model at 33 x 240 x 416 with two photos and 25 steps in bfloat16. The
PyTorch side then follows its recipe: float32 weights under autocast with gradient checkpointing.
Utilisation is the model's arithmetic, counted by PyTorch without recomputation, divided by the time
and by the speed of a large product on the same device.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share the GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoints_convert import wan
from jax_idgrpo import rng
from jax_idgrpo.config import GrpoConfig
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel.hosts import trim_heap_after_compile
from jax_idgrpo.sampling import policy, rollout
from jax_idgrpo.sampling.adapters import add_adapter
from jax_idgrpo.sampling.conditioning import Conditioning
from jax_idgrpo.sampling.pipeline import load_transformer
from jax_idgrpo.training import update
from jax_idgrpo.training.state import start


@dataclasses.dataclass(frozen=True)
class Size:
    """A network, the size of its inputs, and the options of both sides.

    Attributes:
      network: configuration of the transformer.
      shape: (latent frames including photos, height, width).
      text: number of text tokens.
      rank: LoRA rank.
      steps: denoising steps.
      dtype: dtype of the computation.
      checkpointing: gradient checkpointing of PyTorch's side.
      remat, unroll: options of our side.
    """

    network: dict[str, Any]
    shape: tuple[int, int, int]
    text: int
    rank: int
    steps: int
    dtype: str
    checkpointing: bool
    remat: str
    unroll: bool

    @property
    def tokens(self) -> int:
        """Number of tokens of a video; a patch is 2 x 2 latents."""
        return int(np.prod(self.shape)) // 4


SHARED = dict(
    freq_dim=256,
    in_channels=16,
    out_channels=16,
    vace_in_channels=96,
    patch_size=[1, 2, 2],
    qk_norm="rms_norm_across_heads",
    cross_attn_norm=True,
    eps=1e-6,
    rope_max_seq_len=1024,
)
SIZES = {
    "tiny": Size(
        SHARED
        | dict(
            num_attention_heads=2,
            attention_head_dim=16,
            ffn_dim=64,
            num_layers=2,
            text_dim=32,
            vace_layers=[0],
        ),
        shape=(3, 4, 4),
        text=8,
        rank=4,
        steps=3,
        dtype="bfloat16",
        checkpointing=True,
        remat="attention",
        unroll=False,
    ),
    "40m": Size(
        SHARED
        | dict(
            num_attention_heads=6,
            attention_head_dim=64,
            ffn_dim=1536,
            num_layers=12,
            text_dim=512,
            vace_layers=[0, 4, 8],
        ),
        shape=(5, 16, 16),
        text=64,
        rank=8,
        steps=4,
        dtype="float32",
        checkpointing=False,
        remat="none",
        unroll=True,
    ),
    "1.3b": Size(
        SHARED
        | dict(
            num_attention_heads=12,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=30,
            text_dim=4096,
            vace_layers=list(range(0, 30, 2)),
        ),
        shape=(9 + 2, 30, 52),
        text=512,
        rank=32,
        steps=25,
        dtype="bfloat16",
        checkpointing=True,
        remat="attention",
        unroll=False,
    ),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUIDANCE, SHIFT, CLIP, KL, RATE = 4.5, 3.0, 1e-3, 0.004, 1e-4

Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Side:
    """The operations of one side; every call returns when its work is done.

    Attributes:
      forward, gradient: one call without guidance, and its gradient.
      sample: samples a trajectory.
      latents: returns the final latents of a trajectory.
      learn: updates the adapter from a trajectory and the advantages [B] of its rows.
    """

    forward: Callable[[], Any]
    gradient: Callable[[], Any]
    sample: Callable[[], Any]
    latents: Callable[[Any], Any]
    learn: Callable[[Any, np.ndarray], Any]

    def calls(self, advantage: np.ndarray) -> dict[str, Callable[[], Any]]:
        """Return the timed calls by name; all updates use the same trajectory."""
        trajectory = functools.cache(self.sample)
        return {
            "forward": self.forward,
            "gradient of the adapter": self.gradient,
            "rollout": self.sample,
            "update": lambda: self.learn(trajectory(), advantage),
        }


def inputs(rows: int, size: Size) -> Inputs:
    """Generate the inputs of both sides, channels last."""
    rng, width = np.random.default_rng(0), size.network["text_dim"]
    shapes = dict(
        latents=(rows, *size.shape, 16),
        control=(rows, *size.shape, 96),
        text=(rows, size.text, width),
        negative=(size.text, width),
        advantage=(rows,),
    )
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_transformer(folder: str, size: Size) -> None:
    """Write a random checkpoint to `folder`/transformer."""
    import diffusers

    diffusers.WanVACETransformer3DModel(**size.network).save_pretrained(
        Path(folder) / "transformer"
    )


def our_network(size: Size, folder: str | None = None) -> WanTransformer:
    """Load this package's network from a pipeline's folder, or initialise it on the device."""
    run: dict[str, Any] = dict(remat=size.remat, unroll=size.unroll)
    if folder is not None:
        return load_transformer(folder, size.dtype, **run)
    config = dataclasses.replace(wan.config_from_json(size.network), **run)

    def build(key: jax.Array) -> WanTransformer:
        return WanTransformer(config, dtypes=Dtypes.named(size.dtype), rngs=nnx.Rngs(params=key))

    graph = nnx.graphdef(nnx.eval_shape(build, rng.key(0, "init")))
    return nnx.merge(graph, jax.jit(lambda key: nnx.state(build(key)))(rng.key(0, "init")))


def their_network(size: Size, folder: str | None = None) -> torch.nn.Module:
    """Load diffusers' network from a pipeline's folder, or initialise it on the device."""
    import diffusers

    if folder is not None:
        where = Path(folder) / "transformer"
        return diffusers.WanVACETransformer3DModel.from_pretrained(where).to(DEVICE)
    with torch.device(DEVICE):
        return diffusers.WanVACETransformer3DModel(**size.network)


def ours(network: WanTransformer, given: Inputs, steps: int, size: Size) -> Side:
    """Build the side of this package; `learn` returns the metrics of the update.

    Args:
      network: transformer.
      given: result of `inputs`.
      steps: denoising steps.
      size: options.
    """
    actor, lora, base = policy.split(
        add_adapter(network, size.rank, float(size.rank), rng.key(0, "init")), GUIDANCE
    )
    rows = len(given["latents"])
    latents, control, text, negative = (
        jnp.asarray(given[name]) for name in ("latents", "control", "text", "negative")
    )
    timesteps = jnp.full(rows, 500)
    conditioning = Conditioning(
        text=text,
        control=control,
        frame_mask=jnp.ones((rows, size.shape[0]), bool),
        references=jnp.zeros(rows, jnp.int32),
    )
    row_keys = rng.row_keys(rng.key(0, "noise"), jnp.arange(rows), jnp.zeros(rows, jnp.int32))
    schedule = rollout.Schedule.make(steps, SHIFT)
    window = rollout.Window(start=jnp.zeros(rows, jnp.int32), size=steps - 1, final_noise=True)

    def apply(lora: nnx.State, base: nnx.State) -> jax.Array:
        return nnx.merge(actor.adapted, base, lora)(latents, timesteps, text, control)

    forward = jax.jit(apply)
    gradient = jax.jit(jax.grad(lambda lora, base: jnp.sum(apply(lora, base) ** 2)))

    rule = update.UpdateRule(
        policy=actor, grpo=GrpoConfig(clip=CLIP, kl=KL), optimizer=optax.adamw(RATE), ema_decay=0.9
    )
    state = start(rule.optimizer, jax.tree.map(jnp.copy, lora))
    networks = update.Networks(base=base, negative=negative)

    def sample() -> rollout.Trajectory:
        given = (
            actor,
            policy.PolicyInputs(state.params, base, conditioning, negative),
            schedule,
            row_keys,
            row_keys,
            window,
        )
        return jax.block_until_ready(rollout.sample(*given))

    def learn(trajectory: rollout.Trajectory, advantage: np.ndarray) -> dict[str, jax.Array]:
        nonlocal state
        chunk = update.Rollout(
            trajectory=trajectory, conditioning=conditioning, start=window.start, noise=row_keys
        )
        batch = update.store(None, chunk, jnp.int32(0), 1)
        batch = dataclasses.replace(
            batch, advantage=advantage[None], weight=np.ones((1, rows), np.float32)
        )
        state, metrics = jax.block_until_ready(
            update.update(rule, state, networks, batch, schedule, jnp.int32(0))
        )
        return metrics

    return Side(
        forward=lambda: jax.block_until_ready(forward(lora, base)),
        gradient=lambda: jax.block_until_ready(gradient(lora, base)),
        sample=sample,
        latents=lambda trajectory: trajectory.latents,
        learn=learn,
    )


def theirs(base: torch.nn.Module, given: Inputs, steps: int, size: Size, compiled: bool) -> Side:
    """Build the side of diffusers and peft.

    Args:
      base: transformer.
      given: result of `inputs`.
      steps: denoising steps.
      size: options.
      compiled: compile the blocks.
    """
    import peft

    targets = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    lora = peft.LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=targets)
    network = peft.get_peft_model(base, lora).eval().to(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in the recipe
    if size.checkpointing:
        network.get_base_model().enable_gradient_checkpointing()
    if compiled:
        # Variants: rows, with and without gradients and adapter. Beyond the default limit of 8,
        # PyTorch falls back to eager.
        torch._dynamo.config.recompile_limit = 64
        network.get_base_model().compile_repeated_blocks()
    latents, control = (
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(given[name], -1, 1))).to(DEVICE)
        for name in ("latents", "control")
    )
    text, negative = (torch.from_numpy(given[name]).to(DEVICE) for name in ("text", "negative"))
    schedule = rollout.Schedule.make(steps, SHIFT)
    sigmas, timesteps = np.asarray(schedule.sigma).tolist(), np.asarray(schedule.timestep).tolist()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    # States before and after each step, and its log-probability.
    Steps = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def call(
        x: torch.Tensor, timestep: int, text: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        times = torch.full((len(x),), timestep, device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=size.dtype == "bfloat16"):
            v = network(
                hidden_states=x,
                timestep=times,
                encoder_hidden_states=text,
                control_hidden_states=control,
                return_dict=False,
            )
        return v[0].float()

    def velocity(x: torch.Tensor, timestep: int) -> torch.Tensor:
        both = torch.cat([text, negative.expand_as(text)])
        prompt, none = call(torch.cat([x, x]), timestep, both, torch.cat([control, control])).chunk(
            2
        )
        return none + GUIDANCE * (prompt - none)

    def step(
        x: torch.Tensor, v: torch.Tensor, index: int, x_next: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the next state, mean, standard deviation and log-probability [B] of a step."""
        sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
        level = (sigma / (1 - min(sigma, sigmas[1]))) ** 0.5 * 0.7
        mean = (
            x * (1 + level**2 / (2 * sigma) * dt)
            + v * (1 + level**2 * (1 - sigma) / (2 * sigma)) * dt
        )
        std = torch.tensor(level * (-dt) ** 0.5, device=DEVICE)
        x_next = mean + std * torch.randn_like(x) if x_next is None else x_next
        log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * np.log(2 * np.pi)
        return x_next, mean, std, log_prob.flatten(1).mean(1)

    def gradient() -> None:
        network.zero_grad()
        (call(latents, 500, text, control) ** 2).sum().backward()

    @torch.no_grad()
    def sample() -> Steps:
        x, kept = torch.randn_like(latents), []
        for index, timestep in enumerate(timesteps):
            x_next, _, _, log_prob = step(x, velocity(x, timestep), index)
            kept.append((x, x_next, log_prob))
            x = x_next
        return kept

    def learn(trajectory: Steps, weights: np.ndarray) -> None:
        optimizer.zero_grad()
        advantage = torch.from_numpy(weights).to(DEVICE)
        for index, (x, x_next, old) in enumerate(trajectory[:-1]):
            _, mean, std, log_prob = step(x, velocity(x, timesteps[index]), index, x_next)
            with torch.no_grad(), network.disable_adapter():
                reference = step(x, velocity(x, timesteps[index]), index, x_next)[1]
            ratio = torch.exp(log_prob - old)
            loss = torch.maximum(
                -advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
            ).mean()
            loss = loss + KL * ((mean - reference) ** 2 / (2 * std**2)).mean()
            (loss / (steps - 1)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return Side(
        forward=returning_when_done(torch.no_grad()(lambda: call(latents, 500, text, control))),
        gradient=returning_when_done(gradient),
        sample=returning_when_done(sample),
        latents=lambda trajectory: trajectory[-1][1],
        learn=returning_when_done(learn),
    )


def returning_when_done(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a PyTorch call so that it returns when its work on a GPU is done."""

    def wrapped(*given: Any) -> Any:
        found = call(*given)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    return wrapped


# ---- figures -------------------------------------------------------------------------------------


def arithmetic(side: Side, size: Size, steps: int) -> dict[str, float]:
    """Count the model's FLOPs in PyTorch's calls, without those that checkpointing repeats.

    Args:
      side: PyTorch's side.
      size: options.
      steps: denoising steps.
    """

    def counted(call: Callable[[], Any]) -> float:
        # Attention as plain products, which PyTorch counts on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        return float(counter.get_total_flops())

    forward = counted(side.forward)
    both = counted(side.gradient) - (forward if size.checkpointing else 0.0)
    return {
        "forward": forward,
        "gradient of the adapter": both,
        "rollout": 2 * steps * forward,
        "update": 2 * (steps - 1) * (both + forward),  # the adapter's replay, and the frozen base
    }


def product_speed(dtype: str) -> float:
    """Measure the FLOP/s of a large matrix product on JAX's device; the fastest of ten."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


class SideProcess:
    """A side in its own process, undisturbed by the other's threads, allocator and compiler.

    Calling the object with the name of a request returns the answer.

    Args:
      name: "ours" or "theirs".
      folder: folder of the checkpoint; None initialises the network on the device.
      rows, steps: number of videos and of denoising steps.
      size: a name of `SIZES`.
      compiled: compile PyTorch's blocks.
    """

    def __init__(
        self, name: str, folder: str | None, rows: int, steps: int, size: str, compiled: bool
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        given = (end, name, folder, rows, steps, size, compiled)
        context.Process(target=_answer, args=given, daemon=True).start()
        end.close()

    def __call__(self, request: str) -> Any:
        self._pipe.send(request)
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            sys.exit(f"transformer: the process of {self.name} ended; its output is above")


def _answer(
    pipe: Any, name: str, folder: str | None, rows: int, steps: int, size: str, compiled: bool
) -> None:
    """Serve the requests of a `SideProcess`.

    The name of a call runs the call twice; the answer is the seconds of the second call.

    Args: `pipe` receives requests and sends answers; the others are those of `SideProcess`.
    """
    trim_heap_after_compile()  # as in every command of this package
    torch.manual_seed(0)
    sized, given = SIZES[size], inputs(rows, SIZES[size])
    if name == "ours":
        side = ours(our_network(sized, folder), given, steps, sized)
    else:
        side = theirs(their_network(sized, folder), given, steps, sized, compiled)
    answers: dict[str, Callable[[], Any]] = {
        "velocity": lambda: (
            np.asarray(side.forward())
            if name == "ours"
            else np.moveaxis(side.forward().cpu().numpy(), 1, -1)
        ),
        "arithmetic": lambda: arithmetic(side, sized, steps),
        "speed": lambda: product_speed(sized.dtype),
        "peak": lambda: peak_memory(name) / 2**30,
    }
    calls = side.calls(given["advantage"])
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(answers[request]() if request in answers else _again(calls[request]))


def peak_memory(name: str) -> float:
    """Return this process's peak memory in bytes: the allocator's on a GPU, else the system's."""
    if name == "ours" and (seen := jax.devices()[0].memory_stats()):
        return float(seen["peak_bytes_in_use"])
    if name == "theirs" and DEVICE == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds_of(sides: dict[str, SideProcess], name: str, rounds: int) -> dict[str, float]:
    """Measure the median seconds of a call on both sides, which alternate.

    Args:
      sides: processes by name.
      name: a name of `Side.calls`.
      rounds: number of turns.
    """
    turns = [{side: call(name) for side, call in sides.items()} for _ in range(rounds)]
    return {side: statistics.median(turn[side] for turn in turns) for side in sides}


def _again(call: Callable[[], Any]) -> float:
    """Call twice; returns the seconds of the second call."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="40m")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, help="denoising steps; default 4, and 25 for 1.3b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile PyTorch's blocks (regional compilation of diffusers)",
    )
    arguments = parser.parse_args()

    if jax.default_backend() == "gpu" and DEVICE == "cpu":
        sys.exit(
            "transformer: JAX uses a GPU and this PyTorch does not; "
            "install a PyTorch for it, or set JAX_PLATFORMS=cpu"
        )
    size = SIZES[arguments.size]
    steps = arguments.steps or size.steps
    on = jax.devices()[0].device_kind
    print(
        f"{arguments.rows} x {size.tokens} tokens, {steps} denoising steps, {size.dtype}, on {on}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_transformer(folder, size)
        given = (folder, arguments.rows, steps, arguments.size, arguments.compile)
        sides = {name: SideProcess(name, *given) for name in ("ours", "theirs")}
        velocity, want = (side("velocity") for side in sides.values())
    print(f"relative difference {np.linalg.norm(velocity - want) / np.linalg.norm(want):.1e}")
    seconds = {}
    for name in ("forward", "gradient of the adapter", "rollout", "update"):
        seconds[name] = seconds_of(sides, name, arguments.rounds)
        figures = ", ".join(f"{side} {found:.3f} s" for side, found in seconds[name].items())
        print(
            f"{name}: {figures}, ratio {seconds[name]['ours'] / seconds[name]['theirs']:.2f}",
            flush=True,
        )
    print(
        "peak memory: "
        + ", ".join(f"{name} {side('peak'):.2f} GiB" for name, side in sides.items()),
        flush=True,
    )
    if not arguments.compile:  # PyTorch does not count compiled kernels
        counted, speed = sides["theirs"]("arithmetic"), sides["ours"]("speed")
        print(
            f"utilisation: {counted['forward'] / 1e12:.3g} TFLOP forward, "
            f"of {speed / 1e12:.3g} TFLOP/s in a large product"
        )
        for name, found in seconds.items():
            print(
                f"{name}: "
                + ", ".join(
                    f"{side} {counted[name] / each / speed:.0%}" for side, each in found.items()
                )
            )


if __name__ == "__main__":
    main()
