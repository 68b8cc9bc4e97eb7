"""First contact with a GPU: what must be exact is exact, how fast it is, and whether the plan holds.

    python -m benchmarks.gpu --out runs/gpu             on a GPU, under nine minutes, no network
    python -m benchmarks.gpu --small --out runs/gpu     every part at toy size, on a CPU

Every part runs in a process of its own with a time budget, so that an error, a crash or a hang
costs only that part. What earlier parts leave of their time, later ones may use. A part prints and
records each figure as soon as it is measured; one that is stopped keeps those it had. A part with a
property that does not hold runs again with the compiler flag that may restore it, if time is left.
`results.json` and `results.md` in the output folder are written anew after every part. Needs the
package with its `test` extra, and a PyTorch that uses the GPU (see README.md beside this file).

Exit status: 0 every part ran and every property holds, 1 otherwise, 2 there is no GPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

# The libraries of a part are imported within it: one that is missing costs that part alone.

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "flax", "optax",
    "orbax-checkpoint", "torch", "diffusers", "peft", "transformers",
)
LEAST = 10.0    # seconds below which no part is started
PATIENCE = 300.0    # seconds of a small part, which may run on a CPU with other work
TINY = (        # of configs/quickstart.py: the smallest run with every phase of a step
    "--video.frames=5", "--rollout.prompts=2", "--rollout.group=2", "--rollout.steps=2",
    "--rollout.window=fixed", "--rollout.window_size=1", "--reward.frames=2", "--model.rank=2",
    "--model.alpha=2", "--model.dtype=bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure of a part.

    value: None where this device does not report it. against, reference: what it is compared with,
    and the value of that. holds: whether a property holds, None for a figure without one.
    """

    name: str
    value: float | None
    unit: str = ""
    against: str = ""
    reference: float | None = None
    holds: bool | None = None

    @property
    def ratio(self) -> float | None:
        """The value over what it is compared with."""
        return self.value / self.reference if self.value is not None and self.reference else None

    def cells(self) -> list[str]:
        """Return the row as cells of a table."""
        value, reference, ratio = (_number(x) for x in (self.value, self.reference, self.ratio))
        compared = f"{self.against} {reference}".strip() if self.against else ""
        holds = {None: "", True: "yes", False: "**NO**"}[self.holds]
        return [self.name, f"{value} {self.unit}".strip(), compared, ratio if compared else "", holds]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.8g}" if abs(value - 1) < 1e-3 else f"{value:.4g}"


# ---- parts ---------------------------------------------------------------------------------------


def matmul(small: bool, folder: Path) -> Iterator[Row]:
    """Speed of a large matrix product."""
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
        ours = functools.partial(lambda product, x: jax.block_until_ready(product(x, x)), product, x)
        theirs = returning_when_done(functools.partial(torch.matmul, y, y))
        seconds = medians(10, ours=ours, theirs=theirs)
        rate = {name: 2e-12 * side**3 / found for name, found in seconds.items()}
        name = f"{dtype}, {precision} precision"
        yield Row(name, rate["ours"], "TFLOP/s", "PyTorch", rate["theirs"])


def attention(small: bool, folder: Path) -> Iterator[Row]:
    """cuDNN's attention at odd lengths against exact attention in float32 of the same numbers.

    Compared with the error of exact attention in bfloat16, which is that of rounding alone. On a CPU
    JAX's own attention takes cuDNN's place.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_idgrpo.models.attention import DEFAULT_MAX_LOGITS, exact, fused

    heads, width = (2, 16) if small else (12, 128)
    shapes: list[tuple[int, int, list[int] | None]] = [
        (4289, 4289, None), (777, 777, [777, 301]), (4290, 513, [513, 77]),
    ]
    if small:
        shapes = [(33, 33, None), (18, 9, [9, 4])]
    fastest = "cudnn" if jax.default_backend() == "gpu" else "xla"
    reference = functools.partial(exact, max_logits=DEFAULT_MAX_LOGITS)

    for queries, count, hidden in shapes:
        lengths = None if hidden is None else jnp.asarray(hidden, jnp.int32)

        def program(kernel: Callable[..., Any], lengths: Any = lengths) -> Callable[..., Any]:
            """Compile a kernel's output with the gradients of queries, keys and values."""

            def both(q: Any, k: Any, v: Any, cotangent: Any) -> tuple[Any, ...]:
                out, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, lengths), q, k, v)
                return (out, *backward(cotangent))

            return jax.jit(both)

        tokens = zip(jax.random.split(jax.random.key(0), 4), (queries, count, count, queries))
        q, k, v, cotangent = (
            jax.random.normal(key, (2, number, heads, width), jnp.bfloat16) for key, number in tokens
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
            yield Row(f"{shape}: {name}, relative error", error(seen), "", "exact in bfloat16",
                      error(rounded), holds)

        def equal(others: Sequence[Any], found: Sequence[Any] = found) -> list[bool]:
            return [np.array_equal(x, y) for x, y in zip(found, others)]

        again = [equal(quick(*given)) for _ in range(3)]
        for name, index in (("output", slice(0, 1)), ("gradients", slice(1, 4))):
            same = all(all(call[index]) for call in again)
            yield Row(f"{shape}: {name}, equal when repeated", float(same), holds=same)
        if lengths is not None:
            seen = (jnp.arange(count) < lengths[:, None])[..., None, None]
            others = quick(given[0], *(jnp.where(seen, x, 100) for x in (k, v)), cotangent)
            silent = all(equal(others)) and not any(jnp.any(jnp.where(seen, 0, x)) for x in others[2:])
            yield Row(f"{shape}: hidden keys change nothing", float(silent), holds=silent)


def parity(small: bool, folder: Path) -> Iterator[Row]:
    """The velocity of one checkpoint in bfloat16, against diffusers."""
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
    """The ratio of an update right after its rollout, in bfloat16: exactly 1."""
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
    """Two steps in bfloat16 in one process, against one, a restart, and one: equal bit for bit."""
    import numpy as np
    from safetensors.numpy import load_file

    words = TINY if small else ("--model.dtype=bfloat16",)
    whole = _train(folder / "whole", 2, words)
    first = _train(folder / "resumed", 1, words)
    last = _train(folder / "resumed", 2, words)

    def differing(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
        pairs = zip(rows, others, strict=True)
        return float(sum(row[name] != other[name] for row, other in pairs for name in row
                         if not name.startswith("seconds_") and name != "videos_per_hour"))

    metrics = {"first step in two processes": differing(whole[:1], first),
               "both steps, resumed": differing(whole, last)}
    for name, count in metrics.items():
        yield Row(f"{name}: metrics that differ", count, f"of {len(whole[0])}", holds=count == 0)
    one, other = (load_file(folder / name / "export" / "adapter_model.safetensors")
                  for name in ("whole", "resumed"))
    count = float(sum(np.count_nonzero(one[name] != other[name]) for name in one))
    total = sum(tensor.size for tensor in one.values())
    yield Row("both steps, resumed: numbers of the adapter that differ", count, f"of {total}",
              holds=count == 0)


def quickstart(small: bool, folder: Path) -> Iterator[Row]:
    """Training steps of configs/quickstart.py."""
    count = 2 if small else 20
    rows = _train(folder / "run", count, TINY if small else ())
    steps = [sum(row[name] for name in row if name.startswith("seconds_")) for row in rows]
    yield Row("seconds per step", statistics.median(steps[1:]), "s")
    for name, choose in (("ratio_min", min), ("ratio_max", max)):
        ratio = choose(row[name] for row in rows)
        yield Row(f"{name} of {count} steps", ratio, holds=ratio == 1)
    shown = max(1, count // 4)
    begin, end = (statistics.mean(row["reward"] for row in part)
                  for part in (rows[:shown], rows[-shown:]))
    yield Row(f"reward, last {shown} steps", end, "", f"first {shown}", begin, math.isfinite(end))


def _train(workdir: Path, steps: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Run `idgrpo train` on the quickstart up to a step -> its metrics by step."""
    config = str(ROOT / "configs" / "quickstart.py")
    command = [sys.executable, "-m", "jax_idgrpo", "train", config, "--workdir", str(workdir)]
    print(f"train {workdir.name} up to step {steps}", flush=True)
    subprocess.run([*command, f"--run.steps={steps}", "--run.sample_every=0", *words], check=True)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def against_pytorch(small: bool, folder: Path) -> Iterator[Row]:
    """VACE-1.3B at 33 x 240 x 416 in bfloat16 with guidance 4.5, against the published loop."""
    import jax

    from benchmarks import transformer
    from jax_idgrpo.planning.hardware import CHIPS

    if jax.default_backend() == "gpu" and transformer.DEVICE == "cpu":
        raise RuntimeError("this PyTorch sees no GPU; install one built for CUDA")
    name, rows, steps, rounds = ("tiny", 2, 3, 1) if small else ("1.3b", 2, 3, 2)
    sides = {
        side: transformer.Apart(side, None, rows, steps, name, False) for side in ("ours", "theirs")
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
    """The recipe's own programs, 32 videos per call, against `idgrpo plan` without a GPU.

    Measured and planned is what a program takes itself: its arguments, results and temporaries. Two
    denoising steps stand for 25. Seconds are compared with the plan's bound from below.
    """
    import jax

    from jax_idgrpo import cli, config
    from jax_idgrpo.parallel import sharding
    from jax_idgrpo.planning import hardware, plan, programs

    file, topology, words = "vace_1_3b", "h200:1", ["--rollout.prompts=4", "--grpo.updates=1"]
    sizes: str | None = "1.3b"
    if small:
        file, topology, sizes, words = "quickstart", "cpu:1", None, [*TINY]
    words.append("--rollout.steps=2")
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
        here = [(plan.measure(program, mesh, chip), program) for program in every
                if program.name in chosen]
        measured: dict[str, float | None] = {}
        beside = {program.name: program.beside for _, program in here}
        # The device reports the highest peak since the process began, so the largest comes last.
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
    """Run a program of a plan on random numbers -> its own GB at the peak, seconds of a second call.

    The first is None where the device does not report it, or where the program stays below an
    earlier peak.
    """
    import jax

    def statistic(name: str) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get(name)

    own = None
    seconds = math.nan
    for number in range(2):
        arguments = _filled(program.arguments)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array))
        used, before = statistic("bytes_in_use"), statistic("peak_bytes_in_use")
        began = time.perf_counter()
        jax.block_until_ready(program.function(*arguments, **program.options))
        seconds = time.perf_counter() - began
        peak = statistic("peak_bytes_in_use")
        if number == 0 and used is not None and peak is not None and peak != before:
            own = (peak - used + held) / 1e9
    return own, seconds


def _filled(arguments: Any) -> Any:
    """Replace the shapes among a program's arguments by random numbers on the device."""
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
    """A part: what it measures, its time in seconds, and the compiler's flag to try if one of its
    properties does not hold."""

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


# ---- running them --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe the machine and the installed packages."""
    import jax

    device = jax.devices()[0]
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {"backend": jax.default_backend(), "device": device.device_kind, "memory_limit": limit,
            "cores": os.cpu_count(), "python": platform.python_version(), "packages": versions}


def child(name: str, small: bool, record: Path) -> None:
    """Run one part in this process, adding a line to `record` for each figure."""
    found = {"machine": None} if name == "machine" else {}
    with record.open("a") as file, tempfile.TemporaryDirectory() as folder:

        def add(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)

        try:
            if name in found:
                add({"machine": machine()})
            else:
                for row in PARTS[name].run(small, Path(folder)):
                    print(f"{name}: {', '.join(filter(None, row.cells()))}", flush=True)
                    add({"row": dataclasses.asdict(row)})
            add({"status": "done"})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            add({"status": f"failed: {reason[:300]}"})


def run(
    name: str, out: Path, small: bool, seconds: float, flag: str = ""
) -> dict[str, Any]:
    """Run a part in a process of its own, for some seconds at most -> its record."""
    label = f"{name} with {flag}" if flag else name
    print(f"---- {label}: {seconds:.0f} s at most", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(record)]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "programs"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
        }
        process = subprocess.Popen(
            [*command, *(["--small"] if small else [])], env=environment, start_new_session=True
        )
        try:
            status = f"ended with status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):     # and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = record.read_text().splitlines() if record.exists() else []
    found: dict[str, Any] = {"part": label, "status": status, "rows": []}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):     # cut off where it was stopped
            entry = json.loads(line)
            if "row" in entry:
                found["rows"].append(entry["row"])
            else:
                found |= entry
    found["seconds"] = time.monotonic() - began
    print(f"---- {label}: {found['status']}, {found['seconds']:.0f} s", flush=True)
    return found


def write(out: Path, described: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write `results.json` and `results.md`; neither is ever half there."""
    packages = ", ".join(f"{k} {v or 'missing'}" for k, v in described["packages"].items())
    lines = [f"# {described['device']}", "", f"Python {described['python']}; {packages}.", ""]
    lines += ["| part | figure | value | compared with | ratio | holds |", "|---|---|---|---|---|---|"]
    for record in records:
        rows = [Row(**row).cells() for row in record["rows"]]
        status = f"{record['status']}, {record['seconds']:.0f} s"
        lines += [f"| {' | '.join([record['part'], *cells])} |" for cells in rows]
        lines.append(f"| {record['part']} | {status.replace('|', '/')} | | | | |")
    texts = {"results.json": json.dumps({"machine": described, "parts": records}, indent=2),
             "results.md": "\n".join(lines)}
    for name, text in texts.items():
        (out / f".{name}").write_text(text + "\n")
        (out / f".{name}").replace(out / name)


def refuse(message: str) -> NoReturn:
    """End with exit status 2 and one line."""
    print(f"gpu: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results")
    parser.add_argument("--small", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        child(arguments.part, arguments.small, arguments.out)
        return

    out, small = arguments.out, arguments.small
    found = run("machine", out, small, 60)
    if "machine" not in found:
        refuse(f"JAX does not start ({found['status']}); see {Path(__file__).parent / 'README.md'}")
    described = found["machine"]
    on_gpu = described["backend"] == "gpu"
    if not on_gpu and not small:
        refuse("JAX finds no GPU here; use a machine that has one, or pass --small")
    out.mkdir(parents=True, exist_ok=True)
    if not on_gpu:      # compiling takes most of the time
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    began, records = time.monotonic(), []
    allowed = 0.0

    def attempt(name: str, flag: str = "") -> None:
        left = allowed - (time.monotonic() - began)
        if left < LEAST:
            label = f"{name} with {flag}" if flag else name
            record = {"part": label, "status": "not run: no time left", "rows": [], "seconds": 0.0}
        else:
            record = run(name, out, small, left, flag)
        records.append(record)
        write(out, described, records)

    for name in arguments.only:
        allowed += PATIENCE if small else PARTS[name].seconds
        attempt(name)
    sound = [r["status"] == "done" and all(row["holds"] is not False for row in r["rows"])
             for r in records]
    for name, record in zip(arguments.only, tuple(records), strict=True):
        if PARTS[name].flag and any(row["holds"] is False for row in record["rows"]):
            attempt(name, PARTS[name].flag)
    print((out / "results.md").read_text())
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()
