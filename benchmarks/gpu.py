"""Check and benchmark everything on a GPU: exact properties, speed, and the memory plan.

    python -m benchmarks.gpu --out runs/gpu             on a GPU, under nine minutes, no network
    python -m benchmarks.gpu --small --out runs/gpu     every part at toy size, on a CPU

Every part runs in its own process with a time budget, so that an error, a crash or a hang affects
only that part. Later parts may use the time that earlier parts leave. A part prints and records
each figure as soon as it is measured; a stopped part keeps its figures. If a property does not
hold, its part runs again with a compiler flag that may restore the property, if time is left.
`results.json` and `results.md` in the output folder are rewritten after every part. Requires the
package with its `test` extra, and a PyTorch that uses the GPU (see benchmarks/README.md).

Exit status: 0 if every part ran and every property holds, 1 otherwise, 2 if there is no GPU.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_parts import PARTS, ROOT, Row

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "flax",
    "optax",
    "orbax-checkpoint",
    "torch",
    "diffusers",
    "peft",
    "transformers",
)
MACHINE = "machine"  # describes the machine, before all parts
LEAST = 10.0  # smallest remaining time in seconds to start a part
PATIENCE = 300.0  # budget in seconds of a small part, which may run on a busy CPU


def machine() -> dict[str, Any]:
    """Describe the machine and the installed packages."""
    import jax

    device = jax.devices()[0]
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "memory_limit": limit,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def child(name: str, small: bool, record: Path) -> None:
    """Run one part in this process and append a line to `record` for each figure.

    Args:
      name: name of the part.
      small: use toy sizes.
      record: JSON Lines file.
    """
    with record.open("a") as file, tempfile.TemporaryDirectory() as folder:

        def add(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)

        try:
            if name == MACHINE:
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


def run(name: str, out: Path, small: bool, seconds: float, flag: str = "") -> dict[str, Any]:
    """Run a part in its own process.

    Args:
      name: one of `PARTS`, or `MACHINE`.
      out: folder for compiled programs.
      small: use toy sizes.
      seconds: time limit; the part and all its child processes are then killed.
      flag: appended to XLA_FLAGS.

    Returns:
      The record of the part: its figures, status and seconds.
    """
    label = f"{name} with {flag}" if flag else name
    found: dict[str, Any] = {"part": label, "rows": [], "seconds": 0.0}
    if seconds < LEAST:
        return found | {"status": "not run: no time left"}
    print(f"---- {label}: at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(record)]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "programs"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **os.environ,
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
            with contextlib.suppress(ProcessLookupError):  # also kills child processes
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = record.read_text().splitlines() if record.exists() else []
    found["status"] = status
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a stopped part's last line is cut off
            entry = json.loads(line)
            if "row" in entry:
                found["rows"].append(entry["row"])
            else:
                found |= entry
    found["seconds"] = time.monotonic() - began
    print(f"---- {label}: {found['status']}, {found['seconds']:.0f} s", flush=True)
    return found


def write(out: Path, described: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write `results.json` and `results.md` atomically.

    Args:
      out: output folder.
      described: description of the machine.
      records: records of the parts.
    """
    packages = ", ".join(f"{k} {v or 'missing'}" for k, v in described["packages"].items())
    lines = [f"# {described['device']}", "", f"Python {described['python']}; {packages}.", ""]
    lines += ["| part | figure | value | compared with | ratio | holds |", "|---" * 6 + "|"]
    for record in records:
        rows = [Row(**row).cells() for row in record["rows"]]
        status = f"{record['status']}, {record['seconds']:.0f} s"
        lines += [f"| {' | '.join([record['part'], *cells])} |" for cells in rows]
        lines.append(f"| {record['part']} | {status.replace('|', '/')} | | | | |")
    texts = {
        "results.json": json.dumps({"machine": described, "parts": records}, indent=2),
        "results.md": "\n".join(lines),
    }
    for name, text in texts.items():
        (out / f".{name}").write_text(text + "\n")
        (out / f".{name}").replace(out / name)


def refuse(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print(f"gpu: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results")
    parser.add_argument("--small", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        child(arguments.part, arguments.small, arguments.out)
        return

    out, small = arguments.out, arguments.small
    found = run(MACHINE, out, small, 60)
    if "machine" not in found:
        refuse(f"JAX does not start ({found['status']}); see {Path(__file__).parent / 'README.md'}")
    described = found["machine"]
    on_gpu = described["backend"] == "gpu"
    if not on_gpu and not small:
        refuse("JAX finds no GPU here; use a machine that has one, or pass --small")
    out.mkdir(parents=True, exist_ok=True)
    if not on_gpu:  # at toy sizes most of the time is compilation
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    began, allowed = time.monotonic(), 0.0
    records: list[dict[str, Any]] = []

    def attempt(name: str, flag: str = "") -> None:
        left = allowed - (time.monotonic() - began)
        records.append(run(name, out, small, left, flag))
        write(out, described, records)

    for name in arguments.only:
        allowed += PATIENCE if small else PARTS[name].seconds
        attempt(name)
    sound = [
        r["status"] == "done" and all(row["holds"] is not False for row in r["rows"])
        for r in records
    ]
    for name, record in zip(arguments.only, tuple(records), strict=True):
        if PARTS[name].flag and any(row["holds"] is False for row in record["rows"]):
            attempt(name, PARTS[name].flag)
    print((out / "results.md").read_text())
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()
