"""The parts of `gpu.py`: one function per part, which yields its figures.

A part imports its libraries itself, so that a missing library affects only that part.
"""

import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TINY = (  # options of configs/quickstart.py for the smallest run with every phase of a step
    "--video.frames=5",
    "--rollout.prompts=2",
    "--rollout.group=2",
    "--rollout.steps=2",
    "--rollout.window=fixed",
    "--rollout.window_size=1",
    "--reward.frames=2",
    "--model.rank=2",
    "--model.alpha=2",
    "--model.dtype=bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure of a part.

    value: None if the device does not report it. against, reference: name and value of the figure
    to compare with. holds: whether a property holds; None for a figure without a property.
    """

    name: str
    value: float | None
    unit: str = ""
    against: str = ""
    reference: float | None = None
    holds: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Value divided by the reference."""
        return self.value / self.reference if self.value is not None and self.reference else None

    def cells(self) -> list[str]:
        """Return the row as cells of a table."""
        value, reference, ratio = (_number(x) for x in (self.value, self.reference, self.ratio))
        compared = f"{self.against} {reference}".strip() if self.against else ""
        holds = {None: "", True: "yes", False: "**NO**"}[self.holds]
        value = f"{value} {self.unit}".strip()
        return [self.name, value, compared, ratio if compared else "", holds]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.8g}" if abs(value - 1) < 1e-3 else f"{value:.4g}"


# ---- parts ---------------------------------------------------------------------------------------


def matmul(small: bool, folder: Path) -> Iterator[Row]:
    """Measure the speed of a large matrix product."""
    import jax
    import jax.numpy as jnp
    import torch

    from benchmarks.timing import medians
    from benchmarks.transformer import DEVICE, returning_when_done

    side = 256 if small else 8192
    cases = (("bfloat16", "default"), ("float32", "default"), ("float32", "highest"))
    for dtype, precision in cases:
        torch.backends.cuda.matmul.allow_tf32 = precision == "default"
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        y = torch.randn(side, side, device=DEVICE, dtype=getattr(torch, dtype))
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        ours = functools.partial(lambda f, x: jax.block_until_ready(f(x, x)), product, x)
        theirs = returning_when_done(functools.partial(torch.matmul, y, y))
        seconds = medians(10, ours=ours, theirs=theirs)
        rate = {name: 2e-12 * side**3 / found for name, found in seconds.items()}
        name = f"{dtype}, {precision} precision"
        yield Row(name, rate["ours"], "TFLOP/s", "PyTorch", rate["theirs"])


def attention(small: bool, folder: Path) -> Iterator[Row]:
    """Compare cuDNN's attention at odd lengths with exact attention in float32.

    The reference for its errors is exact attention in bfloat16, whose errors are only rounding. A
    CPU uses JAX's own attention instead of cuDNN's.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_idgrpo.models.attention import DEFAULT_MAX_LOGITS, exact, fused

    heads, width = (2, 16) if small else (12, 128)
    shapes: list[tuple[int, int, list[int] | None]] = [
        (4289, 4289, None),
        (777, 777, [777, 301]),
        (4290, 513, [513, 77]),
    ]
    if small:
        shapes = [(33, 33, None), (18, 9, [9, 4])]
    fastest = "cudnn" if jax.default_backend() == "gpu" else "xla"
    reference = functools.partial(exact, max_logits=DEFAULT_MAX_LOGITS)

    for queries, count, hidden in shapes:
        lengths = None if hidden is None else jnp.asarray(hidden, jnp.int32)

        def program(kernel: Callable[..., Any], lengths: Any = lengths) -> Callable[..., Any]:
            """Compile a kernel's output and the gradients of queries, keys and values."""

            def both(q: Any, k: Any, v: Any, cotangent: Any) -> tuple[Any, ...]:
                out, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, lengths), q, k, v)
                return (out, *backward(cotangent))

            return jax.jit(both)

        shapes_of = [(2, number, heads, width) for number in (queries, count, count, queries)]
        seeds = jax.random.split(jax.random.key(0), 4)
        q, k, v, cotangent = map(
            functools.partial(jax.random.normal, dtype=jnp.bfloat16), seeds, shapes_of
        )
        given = ((q.astype(jnp.float32) / math.sqrt(width)).astype(q.dtype), k, v, cotangent)
        quick = program(functools.partial(fused, implementation=fastest))
        found, coarse = quick(*given), program(reference)(*given)
        wide = program(reference)(*(x.astype(jnp.float32) for x in given))
        shape = f"{queries} x {count}" + ("" if hidden is None else f" of {hidden}")
        for name, seen, rounded, true in zip(("output", "dq", "dk", "dv"), found, coarse, wide):

            def error(x: Any, true: Any = true) -> float:
                return float(jnp.linalg.norm(x.astype(jnp.float32) - true) / jnp.linalg.norm(true))

            holds = error(seen) < 3 * error(rounded) + 1e-3
            yield Row(
                f"{shape}: {name}, relative error",
                error(seen),
                "",
                "exact in bfloat16",
                error(rounded),
                holds,
            )

        def equal(others: Sequence[Any], found: Sequence[Any] = found) -> list[bool]:
            return [np.array_equal(x, y) for x, y in zip(found, others)]

        again = [equal(quick(*given)) for _ in range(3)]
        for name, index in (("output", slice(0, 1)), ("gradients", slice(1, 4))):
            same = all(all(call[index]) for call in again)
            yield Row(f"{shape}: {name}, equal when repeated", float(same), holds=same)
        if lengths is not None:
            seen = (jnp.arange(count) < lengths[:, None])[..., None, None]
            others = quick(given[0], *(jnp.where(seen, x, 100) for x in (k, v)), cotangent)
            none = not any(jnp.any(jnp.where(seen, 0, x)) for x in others[2:])
            silent = none and all(equal(others))
            yield Row(f"{shape}: hidden keys change nothing", float(silent), holds=silent)


def parity(small: bool, folder: Path) -> Iterator[Row]:
    """Compare the velocity of one checkpoint in bfloat16 with diffusers."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    from benchmarks import transformer

    torch.manual_seed(0)
    size = transformer.SIZES["tiny" if small else "40m"]
    size = dataclasses.replace(size, dtype="bfloat16", unroll=False)
    given, home = transformer.inputs(2, size), str(folder)
    transformer.write_transformer(home, size)
    ours = transformer.ours(transformer.our_network(size, home), given, size.steps, size)
    network = transformer.their_network(size, home)
    theirs = transformer.theirs(network, given, size.steps, size, compiled=False)
    velocity = np.asarray(ours.forward().astype(jnp.float32))
    want = np.moveaxis(theirs.forward().cpu().numpy(), 1, -1)
    error = float(np.linalg.norm(velocity - want) / np.linalg.norm(want))
    yield Row("velocity, relative difference", error, holds=error < 0.03)


def on_policy(small: bool, folder: Path) -> Iterator[Row]:
    """Check that the ratio of an update right after its rollout is exactly 1, in bfloat16."""
    from benchmarks import transformer

    size = dataclasses.replace(transformer.SIZES["tiny" if small else "1.3b"], remat="full")
    given = transformer.inputs(2, size)
    side = transformer.ours(transformer.our_network(size), given, 3, size)
    for adapter in ("fresh", "trained"):
        metrics = side.learn(side.sample(), given["advantage"])
        for end in ("ratio_min", "ratio_max"):
            ratio = float(metrics[end])
            yield Row(f"{adapter} adapter, {end}", ratio, holds=ratio == 1)


def resume(small: bool, folder: Path) -> Iterator[Row]:
    """Check that a resumed run equals an uninterrupted one bit for bit, in bfloat16."""
    import numpy as np
    from safetensors.numpy import load_file

    words = TINY if small else ("--model.dtype=bfloat16",)
    whole = _train(folder / "whole", 2, words)
    first = _train(folder / "resumed", 1, words)
    last = _train(folder / "resumed", 2, words)

    def differing(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
        pairs = zip(rows, others, strict=True)
        return float(
            sum(
                row[name] != other[name]
                for row, other in pairs
                for name in row
                if not name.startswith("seconds_") and name != "videos_per_hour"
            )
        )

    metrics = {
        "first step in two processes": differing(whole[:1], first),
        "both steps, resumed": differing(whole, last),
    }
    for name, count in metrics.items():
        yield Row(f"{name}: metrics that differ", count, f"of {len(whole[0])}", holds=count == 0)
    one, other = (
        load_file(folder / name / "export" / "adapter_model.safetensors")
        for name in ("whole", "resumed")
    )
    count = float(sum(np.count_nonzero(one[name] != other[name]) for name in one))
    total = sum(tensor.size for tensor in one.values())
    yield Row(
        "both steps, resumed: numbers of the adapter that differ",
        count,
        f"of {total}",
        holds=count == 0,
    )


def quickstart(small: bool, folder: Path) -> Iterator[Row]:
    """Run training steps of configs/quickstart.py."""
    count = 2 if small else 20
    rows = _train(folder / "run", count, TINY if small else ())
    steps = [sum(row[name] for name in row if name.startswith("seconds_")) for row in rows]
    yield Row("seconds per step", statistics.median(steps[1:]), "s")
    for name, choose in (("ratio_min", min), ("ratio_max", max)):
        ratio = choose(row[name] for row in rows)
        yield Row(f"{name} of {count} steps", ratio, holds=ratio == 1)
    shown = max(1, count // 4)
    begin, end = (
        statistics.mean(row["reward"] for row in part) for part in (rows[:shown], rows[-shown:])
    )
    yield Row(f"reward, last {shown} steps", end, "", f"first {shown}", begin, math.isfinite(end))


def _train(workdir: Path, steps: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Run `idgrpo train` on the quickstart up to a step; returns the metrics by step.

    Args:
      workdir: folder of the run.
      steps: last step.
      words: further options.
    """
    config = str(ROOT / "configs" / "quickstart.py")
    command = [sys.executable, "-m", "jax_idgrpo", "train", config, "--workdir", str(workdir)]
    print(f"train {workdir.name} up to step {steps}", flush=True)
    subprocess.run([*command, f"--run.steps={steps}", "--run.sample_every=0", *words], check=True)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def against_pytorch(small: bool, folder: Path) -> Iterator[Row]:
    """Compare VACE-1.3B at 33 x 240 x 416 in bfloat16 with guidance 4.5 with the published loop."""
    import jax

    from benchmarks import transformer
    from jax_idgrpo.planning.hardware import CHIPS

    if jax.default_backend() == "gpu" and transformer.DEVICE == "cpu":
        raise RuntimeError("this PyTorch sees no GPU; install one built for CUDA")
    name, rows, steps, rounds = ("tiny", 2, 3, 1) if small else ("1.3b", 2, 3, 2)
    sides = {
        side: transformer.SideProcess(side, None, rows, steps, name, False)
        for side in ("ours", "theirs")
    }
    seconds = {}
    for call in ("forward", "rollout", "update"):
        found = seconds[call] = transformer.seconds_of(sides, call, rounds)
        what = call if call == "forward" else f"{call} of {steps} steps"
        yield Row(f"{what}, {rows} videos", found["ours"], "s", "PyTorch", found["theirs"])
    peak = {side: ask("peak") * 2**30 / 1e9 for side, ask in sides.items()}
    yield Row("peak memory", peak["ours"], "GB", "PyTorch", peak["theirs"])
    counted = sides["theirs"]("arithmetic")
    chip = CHIPS.get(jax.devices()[0].device_kind)
    speed = chip.flops if chip else sides["ours"]("speed")
    for call, found in seconds.items():
        ours, theirs = (counted[call] / found[side] / speed for side in ("ours", "theirs"))
        unit = f"of {speed / 1e12:.4g} TFLOP/s"
        yield Row(f"{call}, model-FLOP utilization", ours, unit, "PyTorch", theirs)


def memory(small: bool, folder: Path) -> Iterator[Row]:
    """Compare the programs of configs/vace_1_3b.py, 4 videos per call, with their plan.

    The memory is that of a program's arguments, results and temporaries. Four denoising steps
    represent 25. Seconds are compared with the plan's lower bound.
    """
    import jax

    from jax_idgrpo import cli, config
    from jax_idgrpo.parallel import sharding
    from jax_idgrpo.planning import hardware, plan, programs

    sizes: str | None = "1.3b"
    file, topology = "vace_1_3b", "h200:1"
    words = [
        "--rollout.prompts=1",
        "--rollout.group=4",
        "--rollout.micro_batch=4",
        "--rollout.steps=4",
        "--grpo.updates=1",
    ]
    if small:
        file, topology, sizes, words = "quickstart", "cpu:1", None, [*TINY]
    path, chosen = str(ROOT / "configs" / f"{file}.py"), ("rollout", "decode", "update")
    command = [sys.executable, "-m", "jax_idgrpo", "plan", path, "--topology", topology, *words]
    command += ["--programs", *chosen, "--out", str(folder)]
    command += [] if sizes is None else ["--sizes", sizes]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    planning = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        device = jax.devices()[0]
        wanted = config.load(path, cli.split_overrides(words)[1])
        chip = hardware.CHIPS.get(device.device_kind)
        mesh = sharding.make_mesh(wanted.mesh, [device])
        every = programs.programs(wanted, programs.networks(wanted, sizes), mesh)
        here = [
            (plan.measure(program, mesh, chip), program)
            for program in every
            if program.name in chosen
        ]
        measured: dict[str, float | None] = {}
        beside = {program.name: program.beside for _, program in here}
        # The device reports the peak since the start of the process: run the largest program last.
        for cost, program in sorted(here, key=lambda pair: (pair[0].peak or 0) - pair[1].beside):
            own, seconds = _call(program)
            measured[program.name] = own
            if cost.peak is not None:
                compiled = (cost.peak - program.beside) / 1e9
                yield Row(f"{program.name}, memory", own, "GB", "compiled here", compiled)
            yield Row(f"{program.name}, seconds", seconds, "s", "at least", cost.seconds)
            if chip is not None:
                share = cost.flops / seconds / chip.flops
                unit = f"of {chip.flops / 1e12:.4g} TFLOP/s"
                yield Row(f"{program.name}, utilization with recomputation", share, unit)
        if status := planning.wait():
            raise RuntimeError(f"idgrpo plan --topology {topology} ended with status {status}")
        for found in json.loads((folder / "plan.json").read_text())["programs"]:
            name, peak = found["program"], found["peak"]
            planned = None if peak is None else (peak - beside[name]) / 1e9
            yield Row(f"{name}, memory", measured[name], "GB", f"planned for {topology}", planned)
    finally:
        planning.kill()


def _call(program: Any) -> tuple[float | None, float]:
    """Run a program of a plan on random numbers; returns its peak memory in GB, and seconds.

    The seconds are those of a second call. The memory is None if the device does not report it, or
    if the program stays below an earlier peak.
    """
    import jax

    def statistic(name: str) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get(name)

    own = None
    seconds = math.nan
    for number in range(2):
        arguments = _filled(program.arguments)
        arrays = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
        held = sum(array.nbytes for array in arrays)
        used, before = statistic("bytes_in_use"), statistic("peak_bytes_in_use")
        began = time.perf_counter()
        jax.block_until_ready(program.function(*arguments, **program.options))
        seconds = time.perf_counter() - began
        peak = statistic("peak_bytes_in_use")
        if number == 0 and used is not None and peak is not None and peak != before:
            own = (peak - used + held) / 1e9
        del arguments, arrays  # otherwise they would raise the peak of the next call
    return own, seconds


def _filled(arguments: Any) -> Any:
    """Replace the shapes in a program's arguments by random numbers on the device."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(arguments)
    shapes = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}

    def number(index: int, x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(index), x.shape)
        if jnp.issubdtype(x.dtype, jnp.floating):
            key = jax.random.key(index, impl="rbg")
            return (0.02 * jax.random.normal(key, x.shape, jnp.float32)).astype(x.dtype)
        return jnp.ones(x.shape, x.dtype) if x.dtype == jnp.bool else jnp.zeros(x.shape, x.dtype)

    where = {index: x.sharding for index, x in shapes.items()}
    make = jax.jit(lambda: {i: number(i, x) for i, x in shapes.items()}, out_shardings=where)
    filled = jax.block_until_ready(make())
    return jax.tree.unflatten(structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: its function, its time budget in seconds, and a compiler flag for a second attempt.

    The flag is tried if one of the part's properties does not hold.
    """

    run: Callable[[bool, Path], Iterator[Row]]
    seconds: float
    flag: str = ""


WITHOUT_TUNING = "--xla_gpu_autotune_level=0"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
PARTS = {
    "matmul": Part(matmul, 20),
    "attention": Part(attention, 40, DETERMINISTIC),
    "parity": Part(parity, 35),
    "ratio": Part(on_policy, 70, WITHOUT_TUNING),
    "resume": Part(resume, 85, DETERMINISTIC),
    "quickstart": Part(quickstart, 65, WITHOUT_TUNING),
    "transformer": Part(against_pytorch, 110),
    "memory": Part(memory, 90),
}
