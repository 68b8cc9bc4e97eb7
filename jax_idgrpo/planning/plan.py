"""Plan a run for an absent machine by compiling its programs for a named topology.

Every program of a training step (from encoding prompts and photos to the update) and of the
evaluation is lowered from shapes only, on a mesh of the topology's devices, and compiled. Nothing
is allocated or executed. Each program is reported with these figures per chip:

    memory        from the compiler: arguments, results that do not alias an argument, and
                  temporaries; plus other arrays that are in memory at the same time
    FLOPs         of the traced program: matrix products and convolutions, including
                  rematerialisation, with loop bodies multiplied by their trip count
    bytes moved   of the compiled program: reads and writes of every instruction in HBM, with loop
                  bodies multiplied by their trip count
    collectives   of the compiled program: bytes that the chip receives by collectives
    time          max(FLOPs / peak, bytes / HBM bandwidth) + collectives / link bandwidth

The time is a lower bound. It assumes kernels at the chip's peak, full overlap of arithmetic with
HBM traffic, and no overlap with collectives. The compiler's own cost analysis is not used, because
it counts a loop body once.
"""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_idgrpo.config import Config, MeshConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning.cost_model import flops, traffic
from jax_idgrpo.planning.hardware import ABSENT_GPU, CHIPS, GPUS, Chip, devices
from jax_idgrpo.planning.programs import Program, holdings, networks, programs
from jax_idgrpo.rewards.factory import policy_devices
from jax_idgrpo.sampling.pipeline import Architecture
from jax_idgrpo.workdir import write_text

SPARE = 0.1  # share of a chip's memory that a program should leave free


# ---- the plan ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a program per chip and call. The module's docstring describes the estimates.

    Attributes:
      program: name of the program.
      calls: calls per training step, on average.
      peak: bytes of memory at the peak; None if the compiler ran out of memory.
      fits: whether the peak leaves `SPARE` of the memory free.
      flops: floating-point operations.
      moved: bytes read from and written to HBM.
      received: bytes received by collectives.
      seconds: estimated time; None if the chip's speed is unknown.
      utilisation: share of the chip's peak FLOP/s at that time; None if its speed is unknown.
      compile_seconds: time of tracing and compilation.
      program_bytes: size of the lowered program's text.
      note: the compiler's report if it ran out of memory.
    """

    program: str
    calls: int | float
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


def measure(
    program: Program,
    chip: Chip | None,
    options: Mapping[str, str | bool | int | float] | None = None,
) -> Cost:
    """Compile one program and count its cost.

    Args:
      program: the program.
      chip: figures of the chip; None if they are unknown.
      options: compiler options.
    """
    began = time.monotonic()
    traced = program.function.trace(*program.arguments, **program.options)
    arithmetic = flops(traced.jaxpr) / program.devices
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
        return Cost(
            program.name,
            program.calls,
            None,
            False,
            arithmetic,
            math.nan,
            math.nan,
            None,
            None,
            seconds,
            size,
            note,
        )
    seconds = time.monotonic() - began
    found, memory = traffic(compiled.as_text()), compiled.memory_analysis()
    own = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    peak = own + program.beside
    expected = utilisation = None
    if chip is not None:
        expected = (
            max(arithmetic / chip.flops, found.moved / chip.bandwidth) + found.received / chip.links
        )
        utilisation = arithmetic / chip.flops / expected
    fits = chip is None or peak <= (1 - SPARE) * chip.memory
    return Cost(
        program.name,
        program.calls,
        peak,
        fits,
        arithmetic,
        found.moved,
        found.received,
        expected,
        utilisation,
        seconds,
        size,
    )


def meshes(count: int, parts: Architecture, share: int) -> Iterator[tuple[MeshConfig, int]]:
    """Iterate over valid meshes and rows per call, the simplest first.

    Meshes are ordered by few devices per row, then small `tensor` and `data` axes, then few rows
    per call.

    Args:
      count: number of devices.
      parts: networks of the video model.
      share: rows per optimizer step, a multiple of the rows per call.
    """
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    found: list[tuple[MeshConfig, int]] = []
    for seq, tensor, data in itertools.product(powers, powers, powers):
        fsdp, rest = divmod(count, seq * tensor * data)
        heads = parts.transformer.num_heads
        if (
            rest
            or fsdp == 0
            or heads % tensor
            or parts.transformer.ffn_dim % tensor
            or seq * tensor > heads
        ):
            continue
        mesh = MeshConfig(data=data, fsdp=fsdp, seq=seq, tensor=tensor)
        sizes = (data * fsdp, 2 * data * fsdp, 4 * data * fsdp)
        found.extend((mesh, rows) for rows in sizes if share % rows == 0)
    order = sorted(
        found,
        key=lambda pair: (pair[0].seq * pair[0].tensor, pair[0].tensor, pair[0].data, pair[1]),
    )
    return iter(order)


def plan(
    config: Config,
    topology: str,
    sizes: str | None,
    out: Path,
    wanted: Sequence[str] = (),
    search: int = 0,
) -> bool:
    """Compile the programs of a run, print their costs, and write `plan.json` and `table.md`.

    Args:
      config: the run.
      topology: devices to plan for, as in `hardware.devices`.
      sizes: published sizes of the networks; None reads the checkpoint's configuration.
      out: output folder.
      wanted: names of the programs to compile; empty compiles all.
      search: number of meshes and micro-batches to try first, with rollout and update only. The
        fastest one that fits is then used. 0 uses the mesh of `config`.

    Returns:
      Whether every program leaves `SPARE` of the memory free.

    Raises:
      UserError: the topology, the sizes or the mesh is invalid, or no mesh of the search fits.
    """
    found = policy_devices(config, devices(topology))
    parts = networks(config, sizes)
    chip = CHIPS.get(found[0].device_kind)
    options = ABSENT_GPU if topology.partition(":")[0] in GPUS else None
    tried: list[dict[str, Any]] = []
    if search:
        share = config.trained_rows // config.grpo.updates
        for chosen, rows in itertools.islice(meshes(len(found), parts, share), search):
            candidate = dataclasses.replace(
                config, mesh=chosen, rollout=dataclasses.replace(config.rollout, micro_batch=rows)
            )
            mesh = sharding.make_mesh(chosen, found)
            costs = [
                measure(each, chip, options)
                for each in programs(candidate, parts, mesh)
                if phase(each.name) in ("rollout", "update")
            ]
            tried.append(
                {
                    "mesh": dataclasses.asdict(chosen),
                    "micro_batch": rows,
                    "costs": [dataclasses.asdict(cost) for cost in costs],
                }
            )
            total = sum(cost.calls * (cost.seconds or math.inf) for cost in costs)
            tried[-1] |= {
                "fits": all(cost.fits for cost in costs),
                "seconds_per_step": total,
                "config": candidate,
            }
            print(
                f"mesh {_sizes(mesh)}, micro-batch {rows}: {'fits' if tried[-1]['fits'] else 'does not fit'}, {total:.0f} s per step"
            )
        fitting = [trial for trial in tried if trial["fits"]]
        if not fitting:
            raise UserError(
                f"plan: none of the {len(tried)} meshes tried on {topology} fits; search more, or choose a larger slice"
            )
        config = min(fitting, key=lambda trial: trial["seconds_per_step"])["config"]
    mesh = sharding.make_mesh(config.mesh, found)
    costs = []
    for program in programs(config, parts, mesh):
        if not wanted or program.name in wanted or phase(program.name) in wanted:
            costs.append(measure(program, chip, options))
            print(row(costs[-1]), flush=True)
    heading = (
        f"{topology}, {len(found)} x {found[0].device_kind}, mesh {_sizes(mesh)}, {config.rows_per_call} rows per call, "
        f"remat {config.model.remat}, {config.model.dtype}"
    )
    held = holdings(config, parts, mesh)
    sizes_held = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items() if size)
    lines = [*summary(config, costs, chip), f"Of the transformer, training holds: {sizes_held}."]
    table = "\n".join([heading, "", *HEADER, *(row(cost) for cost in costs), "", *lines])
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "topology": topology,
        "device": found[0].device_kind,
        "devices": len(found),
        "chip": chip and dataclasses.asdict(chip),
        "mesh": dict(mesh.shape),
        "config": json.loads(config.to_json()),
        "programs": [dataclasses.asdict(cost) for cost in costs],
        "held": held,
        "tried": [
            {name: value for name, value in trial.items() if name != "config"} for trial in tried
        ],
    }
    write_text(out / "plan.json", json.dumps(record, indent=2))
    write_text(out / "table.md", table + "\n")
    print(table)
    return all(cost.fits for cost in costs)


def phase(name: str) -> str:
    """Return "rollout" or "update" for a program that runs one of two experts, else its name."""
    first = name.partition(": ")[0]
    return first if first in ("rollout", "update") else name


HEADER = (
    "| program | calls per step | peak per chip | TFLOP | moved | received | estimate | utilisation | compiled in |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(cost: Cost) -> str:
    """Format one row of the table."""
    peak = (
        cost.note
        if cost.peak is None
        else f"{cost.peak / 1e9:.1f} GB{'' if cost.fits else ' (does not fit)'}"
    )
    speed = (
        ["-", "-"] if cost.seconds is None else [f"{cost.seconds:.2f} s", f"{cost.utilisation:.0%}"]
    )
    traffic = [f"{cost.moved / 1e9:.1f} GB", f"{cost.received / 1e9:.1f} GB"]
    cells = [
        cost.program,
        f"{cost.calls:g}",
        peak,
        f"{cost.flops / 1e12:.1f}",
        *traffic,
        *speed,
        f"{cost.compile_seconds:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def summary(config: Config, costs: Sequence[Cost], chip: Chip | None) -> list[str]:
    """Summarise the table: assumptions, and time of a training step.

    Args:
      config: the run.
      costs: costs of the programs.
      chip: figures of the chip; None if they are unknown.
    """
    own = config.reward
    absent = [
        f"The reward, {name} {value}, runs on the host: it has no program here, and its time is not counted."
        for name, value in (("reward.custom", own.custom), ("reward.backend", own.backend))
        if value
    ]
    if own.vlm_devices:
        absent.append(
            f"The reward has {own.vlm_devices} more devices for itself; its programs are planned for those."
        )
    if chip is None:
        return [
            *absent,
            "All figures per chip and call. The speed of this device is not known, so times are not estimated.",
        ]
    lines = [
        *absent,
        f"All figures per chip and call. Memory {chip.memory / 1e9:g} GB, of which {1 - SPARE:.0%} may be taken. Estimates assume "
        f"{chip.flops / 1e12:g} TFLOP/s, {chip.bandwidth / 1e12:g} TB/s of memory beside it, and {chip.links / 1e9:g} GB/s of links after "
        "it: a bound from below.",
    ]
    seconds = {
        cost.program: cost.calls * cost.seconds
        for cost in costs
        if cost.calls and cost.seconds is not None
    }
    if {"rollout", "update"} <= set(map(phase, seconds)):
        total = sum(seconds.values())
        rate = 3600 * config.rollout.rows / total
        lines.append(
            f"A training step of {config.rollout.rows} videos: {total:.0f} s, {rate:.0f} videos per hour."
        )
    return lines


def _sizes(mesh: Mesh) -> str:
    return (
        " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
        or "of one device"
    )
