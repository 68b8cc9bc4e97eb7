r"""Compare the growth of an update's cost with the expected curves: tokens, group size, devices.

    python benchmarks/growth.py --record runs/growth.jsonl [--only "tokens, planned" ...] \
        [--plot docs/growth.png]

Planned figures are of the real update, compiled for TPU v6e by the compiler of the `tpu` extra and
counted as by `idgrpo plan`. Measured figures are of the same program run on the CPU. Every case
runs in its own process and is appended to the record; recorded cases are not repeated, so planned
and measured cases can be run separately. Both use narrow transformers of plain Wan with full
rematerialisation and the KL term (`PLANNED`, `MEASURED`); rows have 16 latent frames. Expected:

    arithmetic    blocks (a n + b n^2). Linear layers: four passes (replay, its recomputation in the
                  backward pass, the gradient, the base of the KL term). Attention: three passes of
                  2 products, and a backward pass of 7 products on a TPU, 5 on the CPU.
    memory        linear in tokens, because no n x n array is stored; constant in the group size,
                  because rows are processed a few at a time.
    devices       1 / devices. Memory with `data`: except for the weights, which are replicated.
                  Time: arithmetic at the chip's peak.
"""

import argparse
import ctypes
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jax_idgrpo import config as c
from jax_idgrpo.metrics import read_metrics
from jax_idgrpo.models.umt5 import UMT5Config
from jax_idgrpo.models.wan import WanConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning import hardware, plan, programs
from jax_idgrpo.sampling import rollout

matplotlib.use("Agg")
from matplotlib import pyplot

PLANNED: dict[str, Any] = dict(
    num_layers=4, num_heads=4, head_dim=128, ffn_dim=2048, text_dim=512, rank=32, alpha=32.0
)
MEASURED: dict[str, Any] = dict(
    num_layers=3, num_heads=4, head_dim=32, ffn_dim=512, text_dim=128, rank=8, alpha=8.0
)
TEXT, PEOPLE, FRAMES, SHIFT = 64, 2, 16, 3.0
VIDEO_FRAMES = 4 * (FRAMES - PEOPLE - 1) + 1
CHIP = "TPU v6 lite"
SLICES = {1: "v6e:2x2", 4: "v6e:2x2", 16: "v6e:4x4"}  # number of used chips -> slice
ENOUGH = 6.0  # total seconds of calls after which timing stops


@dataclasses.dataclass(frozen=True)
class Case:
    """One update.

    Attributes:
      sweep: name of the sweep.
      height, width: a row has 16 x height x width tokens.
      rows, micro: number of rows, and of rows per micro-batch.
      steps: denoising steps; one fewer is trained.
      devices, axis: number of chips along a mesh axis.
    """

    sweep: str
    height: int
    width: int
    rows: int
    micro: int
    steps: int = 2
    devices: int = 1
    axis: str = "data"

    @property
    def planned(self) -> bool:
        return self.sweep.endswith("planned")

    @property
    def tokens(self) -> int:
        return FRAMES * self.height * self.width

    @property
    def network(self) -> WanConfig:
        return WanConfig(**(PLANNED if self.planned else MEASURED), remat="full")

    def program(self, devices: Sequence[jax.Device]) -> programs.Program:
        """Build the update."""
        config = c.Config(
            model=c.ModelConfig(
                kind="phantom", dtype="bfloat16" if self.planned else "float32", remat="full"
            ),
            data=c.DataConfig(max_people=PEOPLE, text_length=TEXT),
            video=c.VideoConfig(
                frames=VIDEO_FRAMES, height=16 * self.height, width=16 * self.width
            ),
            rollout=c.RolloutConfig(
                prompts=1,
                group=self.rows,
                micro_batch=self.micro,
                steps=self.steps,
                shift=SHIFT,
                guidance=1.0,
                image_guidance=1.0,
            ),
        )
        width = self.network.text_dim
        text_encoder = UMT5Config(
            d_model=width, d_ff=width, num_heads=4, d_kv=width // 4, num_layers=1, vocab_size=64
        )
        mesh = sharding.make_mesh(c.MeshConfig(**{"data": 1, "fsdp": 1} | {self.axis: -1}), devices)
        parts = programs.Architecture(self.network, programs.PUBLISHED_VAE, text_encoder)
        return next(
            program
            for program in programs.programs(config, parts, mesh)
            if program.name == "update"
        )

    def arithmetic(self) -> float:
        """Compute the FLOPs of the update on all devices by the formula of the docstring."""
        n, net = self.tokens, self.network
        linear = 2 * n * (6 * net.width**2 + 2 * net.width * net.ffn_dim) + 4 * TEXT * net.width**2
        adapter = 4 * (6 * n + 2 * TEXT) * net.width * net.rank
        attention = 4 * n * (n + TEXT) * net.width
        return (
            self.rows
            * (self.steps - 1)
            * net.num_layers
            * (4 * (linear + adapter) + (6.5 if self.planned else 5.5) * attention)
        )


SIDES = {
    1024: (8, 8),
    2304: (12, 12),
    4096: (16, 16),
    9216: (24, 24),
    18432: (24, 48),
    36864: (48, 48),
}
CASES = [
    *(Case("tokens, planned", *SIDES[n], 2, 1) for n in (1024, 4096, 9216, 18432, 36864)),
    *(Case("tokens, measured", *SIDES[n], 2, 1) for n in (1024, 2304, 4096, 9216)),
    *(Case("group, measured", 4, 8, rows, 2) for rows in (2, 4, 8, 16, 32, 64)),
    *(Case("devices, planned", *SIDES[4096], 16, 16, devices=n) for n in (1, 4, 16)),
    *(Case("devices, planned", *SIDES[4096], 16, 16, devices=n, axis="fsdp") for n in (4, 16)),
]


# ---- one case ------------------------------------------------------------------------------------


def planned(case: Case) -> dict[str, float]:
    """Compile the update for the chips and count memory, FLOPs and seconds."""
    devices = hardware.devices(SLICES[case.devices])[: case.devices]
    program = case.program(devices)
    mesh = jax.tree.leaves(program.arguments[1])[0].sharding.mesh
    cost = plan.measure(program, mesh, hardware.CHIPS[CHIP])
    assert cost.peak is not None
    assert cost.seconds is not None
    return dict(
        memory=cost.peak - program.beside,
        flops=cost.flops * case.devices,
        seconds=cost.seconds,
        compiled=cost.compile_seconds,
    )


def measured(case: Case) -> dict[str, float]:
    """Run the update and measure processor seconds and memory.

    Seconds are the minimum over calls, without the first. They are processor seconds, which other
    jobs disturb less than elapsed time. Memory is the increase during the first call, and the peak
    of the whole process.
    """
    program = case.program(jax.devices()[:1])
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(
                jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype), leaf.sharding
            )
        return (
            jnp.ones(leaf.shape, leaf.dtype)
            if leaf.dtype == jnp.bool
            else jnp.zeros(leaf.shape, leaf.dtype)
        )

    objective, state, networks, batch, _, step = jax.tree.map(fill, program.arguments)
    given = (
        networks,
        batch.replace(weight=jnp.ones_like(batch.weight)),
        rollout.Schedule.make(case.steps, SHIFT),
        step,
    )
    call = program.function.lower(objective, state, *given).compile()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, seconds = _memory("VmRSS"), []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < ENOUGH):
        began = time.process_time()
        state, _ = jax.block_until_ready(call(state, *given))
        seconds.append(time.process_time() - began)
        if len(seconds) == 1:
            taken = _memory("VmHWM") - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return dict(memory=taken, peak=peak, seconds=min(seconds[1:]))


def _memory(name: str) -> float:
    """Return an entry of /proc/self/status in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return 1024.0 * int(line.split()[1])


# ---- all cases -----------------------------------------------------------------------------------

Rows = list[tuple[Case, dict[str, float]]]


def table(rows: Rows) -> str:
    """Format all cases, with the expected arithmetic and the ratio of counted to expected."""
    head = (
        "sweep",
        "tokens",
        "rows, at a time",
        "chips",
        "memory",
        "TFLOP expected",
        "counted / expected",
        "seconds",
    )
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for case, found in rows:
        memory = f"{found['memory'] / 1e6:,.0f} MB" + (
            f" (process {found['peak'] / 1e6:,.0f})" if "peak" in found else ""
        )
        counted = f"{found['flops'] / case.arithmetic():.3f}" if "flops" in found else ""
        cells = (
            case.sweep,
            f"{case.tokens:,}",
            f"{case.rows}, {case.micro}",
            f"{case.axis} {case.devices}" if case.planned else "CPU",
            memory,
            f"{case.arithmetic() / 1e12:.3g}",
            counted,
            f"{found['seconds']:.3g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def line(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Evaluate the straight line through the first and the last point at x."""
    return y[0] + (np.asarray(x) - x[0]) * (y[-1] - y[0]) / (x[-1] - x[0])


def draw(rows: Rows, out: Path) -> None:
    """Plot one panel per sweep and quantity, with dashed expected curves."""
    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7))

    def panel(
        axis: Any,
        title: str,
        sweep: str,
        x: Callable[[Case], float],
        name: str,
        scale: float,
        unit: str,
        expect: Callable,
    ) -> None:
        chosen = [(case, found) for case, found in rows if case.sweep == sweep]
        for kind in dict.fromkeys(case.axis for case, _ in chosen if case.devices > 1) or ["data"]:
            part = [
                (case, found) for case, found in chosen if case.axis == kind or case.devices == 1
            ]
            at, values = [x(case) for case, _ in part], [found[name] / scale for _, found in part]
            color = "C0" if kind == "data" else "C1"
            axis.plot(
                at,
                values,
                "o-",
                color=color,
                label=kind if sweep.startswith("devices") else sweep.split(", ")[1],
            )
            axis.plot(
                at,
                expect([case for case, _ in part], at, values),
                "--",
                color=color,
                alpha=0.6,
                label="expected",
            )
        axis.set(
            title=title,
            xscale="log",
            yscale="log",
            ylabel=unit,
            xlabel=sweep.split(",")[0].replace("group", "rows of the group"),
        )
        ticks = sorted({x(case) for case, _ in chosen})
        axis.set_xticks(
            ticks, [f"{tick:,}" if tick < 1000 else f"{tick / 1024:.3g}k" for tick in ticks]
        )
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    def by_hand(cases: Sequence[Case], at: Sequence[float], values: Sequence[float]) -> list[float]:
        return [case.arithmetic() / 1e12 for case in cases]

    def same_rate(
        cases: Sequence[Case], at: Sequence[float], values: Sequence[float]
    ) -> list[float]:
        return [values[0] * case.arithmetic() / cases[0].arithmetic() for case in cases]

    def straight(cases: Sequence[Case], at: Sequence[float], values: Sequence[float]) -> np.ndarray:
        return line(at, values)

    def shared(cases: Sequence[Case], at: Sequence[float], values: Sequence[float]) -> np.ndarray:
        return values[0] / np.asarray(at)

    def fixed_and_shared(
        cases: Sequence[Case], at: Sequence[float], values: Sequence[float]
    ) -> np.ndarray:
        return (
            line([1 / n for n in at], values)
            if cases[-1].axis == "data"
            else shared(cases, at, values)
        )

    def at_peak(cases: Sequence[Case], at: Sequence[float], values: Sequence[float]) -> list[float]:
        return [case.arithmetic() / case.devices / hardware.CHIPS[CHIP].flops for case in cases]

    def tokens(case: Case) -> float:
        return case.tokens

    def group(case: Case) -> float:
        return case.rows

    def devices(case: Case) -> float:
        return case.devices

    first, second = axes
    panel(
        first[0],
        "arithmetic of an update",
        "tokens, planned",
        tokens,
        "flops",
        1e12,
        "TFLOP",
        by_hand,
    )
    panel(first[1], "memory, TPU", "tokens, planned", tokens, "memory", 1e6, "MB", straight)
    panel(first[2], "time, CPU", "tokens, measured", tokens, "seconds", 1, "s", same_rate)
    panel(
        first[3], "memory of a call, CPU", "tokens, measured", tokens, "memory", 1e6, "MB", straight
    )
    panel(second[0], "time, CPU", "group, measured", group, "seconds", 1, "s", same_rate)
    panel(
        second[1],
        "memory of a call, CPU",
        "group, measured",
        group,
        "memory",
        1e6,
        "MB",
        lambda _, at, values: [values[0]] * len(at),
    )
    panel(
        second[2],
        "planned memory per chip",
        "devices, planned",
        devices,
        "memory",
        1e6,
        "MB",
        fixed_and_shared,
    )
    panel(
        second[3], "planned time per chip", "devices, planned", devices, "seconds", 1, "s", at_peak
    )
    second[1].set_ylim(10, 200)  # a wide range, so that a flat curve looks flat
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=sorted({case.sweep for case in CASES}),
        help="sweeps to run; without any, none",
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--case", type=int, help="run this one and print its row")
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = CASES[arguments.case]
        print(
            json.dumps(
                {
                    "case": dataclasses.asdict(case),
                    "found": planned(case) if case.planned else measured(case),
                }
            )
        )
        return

    def rows() -> Rows:
        found = [(Case(**row["case"]), row["found"]) for row in read_metrics(arguments.record)]
        return sorted(
            (row for row in found if row[0] in CASES), key=lambda row: CASES.index(row[0])
        )

    sweeps = {case.sweep for case in CASES} if arguments.only is None else arguments.only
    for index, case in enumerate(CASES):
        if case.sweep in sweeps and case not in [done for done, _ in rows()]:
            command = [
                sys.executable,
                __file__,
                "--record",
                str(arguments.record),
                "--case",
                str(index),
            ]
            text = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
            arguments.record.parent.mkdir(parents=True, exist_ok=True)
            with arguments.record.open("a") as file:
                file.write(text + "\n")
            print(text, flush=True)
    print(table(rows()))
    if arguments.plot:
        draw(rows(), arguments.plot)


if __name__ == "__main__":
    main()
