"""Run several processes as one: connect them, compare their inputs, and move values across them.

There is one process per host, or one per GPU under Slurm. One of the following connects them:

    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i
                               explicitly, as launch/local_multiprocess.sh does
    Slurm's own variables      under srun
    IDGRPO_DISTRIBUTED=auto    on TPU slices, whose metadata JAX reads

Without any of these a process runs by itself. Every process runs the same programs in the same
order. A function marked "(collective)" waits for all processes, so all must call it. Only work
outside of programs, such as writing files, may differ.
"""

import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import ArrayLike

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError

P = ParamSpec("P")
Tree = TypeVar("Tree")
Value = TypeVar("Value")

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jax-idgrpo")
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as lost and the run ends
SAMPLE = 2**20  # bytes of a large file that are compared at its beginning, middle and end


# ---- connecting ----------------------------------------------------------------------------------


def _number(name: str, environment: Mapping[str, str], low: int) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name} is {text!r}; set it to a whole number of {low} or more")
    return int(text)


def arguments(environment: Mapping[str, str]) -> dict[str, str | int] | None:
    """Derive the arguments of `jax.distributed.initialize`.

    Returns:
      The arguments; {} if JAX detects the cluster by itself, None for a single process.

    Raises:
      UserError: the explicit variables are incomplete or contradict one another.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        if missing:
            raise UserError(
                f"{' and '.join(given)} without {' and '.join(missing)}: set all three, or none "
                "to run alone"
            )
        count, number = _number(EXPLICIT[1], environment, 1), _number(EXPLICIT[2], environment, 0)
        if number >= count:
            raise UserError(
                f"JAX_PROCESS_ID is {number} and JAX_NUM_PROCESSES {count}; processes are numbered "
                f"from 0 to {count - 1}"
            )
        address = environment[EXPLICIT[0]]
        if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is {address!r}; it names a host and a port of process 0, "
                "such as 10.0.0.2:8476"
            )
        return {"coordinator_address": address, "num_processes": count, "process_id": number}
    if environment.get("IDGRPO_DISTRIBUTED"):
        if environment["IDGRPO_DISTRIBUTED"] != "auto":
            raise UserError(
                f"IDGRPO_DISTRIBUTED is {environment['IDGRPO_DISTRIBUTED']!r}; set it to auto, or "
                "leave it out"
            )
        return {}
    # srun starts a step; the batch script itself is a single process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {}
    return None


def initialise(environment: Mapping[str, str] = os.environ) -> None:
    """Initialise the distributed runtime, if there are other processes (collective).

    Must run before the first JAX call. Does nothing if it ran before.

    Raises:
      UserError: the variables are unusable, the processes cannot connect at the address, or not all
        of them connect within five minutes (`IDGRPO_PATIENCE` seconds).
    """
    wanted = arguments(environment)
    if wanted is None or wanted.get("num_processes") == 1 or is_distributed():
        return
    if "coordinator_address" in wanted:
        check_address(str(wanted["coordinator_address"]), listens=wanted["process_id"] == 0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    patience = _patience(environment)
    try:
        # JAX aborts the process at the end of its own timeout, so ours is shorter.
        _within(
            patience,
            lambda: jax.distributed.initialize(
                **wanted,
                heartbeat_timeout_seconds=HEARTBEAT,
                initialization_timeout=patience + HEARTBEAT,
            ),
        )
        barrier("connected")  # while all are here (see `sharding.connect_groups`)
    except Exception as error:  # the type depends on how the cluster was detected
        reason = " ".join(str(error).split())[:200]
        where = wanted.get("coordinator_address", "the addresses that the cluster gives")
        raise UserError(
            f"the processes did not find each other at {where} ({reason}); start all of them, "
            "and let them reach process 0 at that address"
        ) from None


def check_address(address: str, listens: bool) -> None:
    """Refuse an address at which the processes cannot connect.

    JAX would wait for minutes, or crash.

    Args:
      address: "host:port" of process 0.
      listens: whether this is process 0, which listens at the port.

    Raises:
      UserError: the host has no address, or process 0 cannot listen at the port.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}: the host {host} cannot be found ({reason}); "
            "give the name or the IP address by which this machine reaches process 0"
        ) from None
    if listens:
        _check_port(int(port), address)


def _check_port(port: int, address: str) -> None:
    """Bind the port as JAX does: at all addresses of this machine, IPv6 and IPv4.

    Raises:
      UserError: another program uses the port, or this user lacks the permission.
    """
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listening:
                # Connections that have just ended do not block the port for JAX either.
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(("", port))
        except OverflowError as error:
            raise _refused_port(port, address, f"cannot be used ({error})") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _refused_port(port, address, "is in use") from None
            if error.errno == errno.EACCES:
                raise _refused_port(port, address, f"cannot be used ({error.strerror})") from None
            # Otherwise this machine lacks the family.


def _refused_port(port: int, address: str, reason: str) -> UserError:
    return UserError(
        f"JAX_COORDINATOR_ADDRESS is {address!r}: port {port} of process 0 {reason}; choose "
        "another, the same in all processes"
    )


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Call a function in a thread of its own.

    Raises:
      TimeoutError: the call takes longer than `seconds`; its thread continues.
      Exception: any exception of the call.
    """
    failures: list[Exception] = []

    def call() -> None:
        try:
            function()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not all came within {seconds:.0f} s")
    for failure in failures:
        raise failure


def is_distributed() -> bool:
    """Return whether this process is connected to others. Does not start JAX."""
    return jax.distributed.is_initialized()


def _patience(environment: Mapping[str, str]) -> int:
    """Return the seconds to wait for the other processes at the start."""
    return _number("IDGRPO_PATIENCE", environment, 1) if environment.get("IDGRPO_PATIENCE") else 300


# ---- the same inputs everywhere ------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _fingerprint(file: Path) -> str:
    """Return size and hash of a file; a large file is hashed by three samples.

    Adapters, reward heads and whole models of one shape have files of equal size, so the size does
    not distinguish them.
    """
    size = file.stat().st_size
    if size <= 3 * SAMPLE:
        return f"{size} {hashlib.sha256(file.read_bytes()).hexdigest()}"
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
            opened.seek(start)
            digest.update(opened.read(SAMPLE))
    return f"{size} {digest.hexdigest()}"


def folder_facts(folder: Path) -> str:
    """List name, size and hash of a file, or of all files below a folder except hidden ones."""
    if folder.is_file():
        return f"{folder.name} {_fingerprint(folder)}"
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return "\n".join(f"{path.relative_to(folder)} {_fingerprint(path)}" for path in files)


def assert_facts_match(facts: Mapping[str, str]) -> None:
    """Compare the hashes of values across processes (collective).

    All processes must pass the same names.

    Args:
      facts: values by their names in error messages.

    Raises:
      UserError: facts differ from those of process 0; the message names the facts and the
        processes.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack(
        [
            np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
            for value in facts.values()
        ]
    )
    everyone = np.asarray(multihost_utils.process_allgather(digests))
    differing = [
        f"{name} (process {', '.join(map(str, others))})"
        for row, name in enumerate(facts)
        if (others := np.flatnonzero((everyone[:, row] != everyone[0, row]).any(-1)).tolist())
    ]
    if differing:
        raise UserError(
            f"the hosts differ from process 0 in {'; '.join(differing)}; give all of them the same "
            "and start again"
        )


def assert_same_across_hosts(config: Config, rows: Sequence[str], **folders: Path) -> None:
    """Compare configuration, data, networks and library versions across processes (collective).

    Args:
      config: the configuration.
      rows: digests of the rows that the command reads, such as those of prompts by
        `data.prompts.row_digests`.
      **folders: further files and folders to compare, by their names in error messages.

    Raises:
      UserError: the processes differ.
    """
    if jax.process_count() == 1:
        return
    reward = config.reward
    faces = str(reward.folder()) if reward.faces else ""
    custom = reward.custom.rpartition(":")[0]
    own = custom if custom.endswith(".py") else ""  # the user's own reward function
    networks = reward.head, reward.linear, reward.people, reward.vlm, reward.vlm_base
    files = [Path(name) for name in (faces, *networks, reward.vlm_prompt, own) if name]
    assert_facts_match(
        {
            "the configuration": config.to_json(),
            "the prompts, photos or pairs": "\n".join(rows),
            "the checkpoint": folder_facts(config.model.folder()),
            "the reward": "\n".join(map(folder_facts, files)),
            **{f"the {name}": folder_facts(folder) for name, folder in folders.items()},
            **versions(),
        }
    )


# ---- values that cross processes -----------------------------------------------------------------


def to_host(tree: Tree) -> Tree:
    """Fetch arrays of any sharding as whole numpy arrays in every process (collective)."""
    leaves, structure = jax.tree.flatten(tree)
    gather = {
        place: leaf
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array)
        and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    }
    found = multihost_utils.process_allgather(gather, tiled=True) if gather else {}
    whole = [found[place] if place in found else _local(leaf) for place, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, whole)


def _local(leaf: ArrayLike) -> np.ndarray:
    remote = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return np.asarray(leaf.addressable_data(0) if remote else leaf)


def to_device(tree: Tree) -> Tree:
    """Copy arrays that span processes to this process's devices (collective).

    Other arrays are returned as they are.
    """
    alone = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return tree if alone else jax.tree.map(jnp.asarray, to_host(tree))


def any_process(flag: bool) -> bool:
    """Compute the logical OR of `flag` across processes (collective)."""
    return (
        flag
        if jax.process_count() == 1
        else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
    )


def gather_objects(value: Value) -> list[Value]:
    """Gather a JSON value of any size from each process, ordered by process (collective)."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).ravel()
    everyone = np.asarray(
        multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    )
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name (collective)."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


# ---- what belongs to a machine, or to process 0 --------------------------------------------------


@functools.cache
def local_process_count() -> int:
    """Count this run's processes on this machine (collective at the first call)."""
    names = gather_objects(socket.gethostname())
    return names.count(names[jax.process_index()])


def memory_share(budget: int) -> int:
    """Divide `budget` bytes of a machine's memory among this run's processes on that machine.

    Collective at the first call.
    """
    return budget // local_process_count()


def run_once(write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `write(*args, **kwargs)` in process 0 only.

    Args:
      write: a function that only writes files or output.
      *args: its positional arguments.
      **kwargs: its keyword arguments.
    """
    if jax.process_index() == 0:
        write(*args, **kwargs)


def print_once(text: str) -> None:
    """Print a result in process 0 only."""
    run_once(print, text)


COMPILED = "/jax/core/compile/backend_compile_duration"
"""Event that JAX records after it compiled a program, before the program runs."""


def trim_heap_after_compile(least: float = 1.0) -> None:
    """Return freed heap memory to the OS (`malloc_trim`) after every XLA compilation.

    XLA frees hundreds of megabytes after a large program. glibc keeps this memory, which adds to
    the process's peak once the program allocates its arrays. Without glibc the function has no
    effect.

    Args:
      least: minimum seconds of a compilation to trim after; a trim takes up to 0.1 s.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_: str | int) -> None:
        if event == COMPILED and seconds >= least:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
