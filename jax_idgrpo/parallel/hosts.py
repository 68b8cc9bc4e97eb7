"""Several processes as one run: how they find each other, what they must agree on before they start, and arrays that cross them.

One process per host (or per GPU under Slurm). They are told of each other by

    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i      explicitly, as launch/local_multiprocess.sh does
    Slurm's own variables                                                      under srun
    IDGRPO_DISTRIBUTED=auto                                                    on TPU slices, whose metadata JAX reads

and without any of these a process runs alone. Every process does the same things in the same order; what differs between them is data that
no program sees, such as who writes files.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jax_idgrpo.config import Config
from jax_idgrpo.errors import UserError

P = ParamSpec("P")

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jax-idgrpo")
HEARTBEAT = 30      # seconds after which a process that says nothing is lost, and the run with it
SAMPLE = 2**20      # bytes of a large file that are compared at its beginning, middle and end


def _number(name: str, environment: Mapping[str, str], low: int) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name} is {text!r}; set it to a whole number of {low} or more")
    return int(text)


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told, {} where it finds out by itself, None for a process that is alone.

    Raises:
      UserError: the explicit variables are incomplete or contradict one another.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        if missing:
            raise UserError(f"{' and '.join(given)} without {' and '.join(missing)}: set all three, or none to run alone")
        count, number = _number(EXPLICIT[1], environment, 1), _number(EXPLICIT[2], environment, 0)
        if number >= count:
            raise UserError(f"JAX_PROCESS_ID is {number} and JAX_NUM_PROCESSES {count}; processes are numbered from 0 to {count - 1}")
        address = environment[EXPLICIT[0]]
        if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it names a host and a port of process 0, such as 10.0.0.2:8476")
        return {"coordinator_address": address, "num_processes": count, "process_id": number}
    if environment.get("IDGRPO_DISTRIBUTED"):
        if environment["IDGRPO_DISTRIBUTED"] != "auto":
            raise UserError(f"IDGRPO_DISTRIBUTED is {environment['IDGRPO_DISTRIBUTED']!r}; set it to auto, or leave it out")
        return {}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:      # a step is what srun starts; the batch script itself is alone
        return {}
    return None


def initialise(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes, if there are any; before anything else is done with JAX.

    Raises:
      UserError: the variables cannot be used, or the others do not come within five minutes.
    """
    wanted = arguments(environment)
    if wanted is None or wanted.get("num_processes") == 1:
        return
    if "coordinator_address" in wanted:
        check_address(wanted["coordinator_address"], listens=wanted["process_id"] == 0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    patience = _patience(environment)
    try:
        # JAX aborts the process when its own time is up, so ours is up before.
        _within(patience, lambda: jax.distributed.initialize(
            **wanted, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=patience + HEARTBEAT
        ))
    except Exception as error:  # of many types, by the way in which the processes were to be found
        reason = " ".join(str(error).split())[:200]
        where = wanted.get("coordinator_address", "the addresses that the cluster gives")
        raise UserError(
            f"the processes did not find each other at {where} ({reason}); start all of them, and let them reach process 0 at that address"
        ) from None


def check_address(address: str, listens: bool) -> None:
    """Refuse an address at which the processes cannot meet, before JAX waits for it or dies of it.

    Args:
      address: "host:port" of process 0.
      listens: this is process 0, which will listen at the port.

    Raises:
      UserError: the host has no address, or process 0 cannot listen at the port.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}: the host {host} cannot be found ({reason}); give the name or the IP address by which "
            "this machine reaches process 0"
        ) from None
    if listens:
        _check_port(int(port), address)


def _check_port(port: int, address: str) -> None:
    """Try the port as JAX will use it: at all addresses of this machine, of both families or of the one that there is.

    Raises:
      UserError: another program uses it, or this user may not.
    """
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # connections that have just ended do not count
                listening.bind(("", port))
        except (OSError, OverflowError) as error:
            if not isinstance(error, OSError) or error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = "is in use" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS is {address!r}: port {port} of process 0 {reason}; choose another, the same in all processes"
                ) from None


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Call a function in a thread of its own; TimeoutError, with the thread left behind, when it takes longer."""
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


def joined() -> bool:
    """Whether other processes were joined; does not start JAX."""
    return jax.distributed.is_initialized()


def _patience(environment: Mapping[str, str]) -> int:
    """Seconds that the processes wait for each other at the start."""
    return _number("IDGRPO_PATIENCE", environment, 1) if environment.get("IDGRPO_PATIENCE") else 300


def versions() -> dict[str, str]:
    """Python and the libraries that decide a number."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def _fingerprint(file: Path) -> str:
    """Size and hash of a file: of all its bytes, or of three samples where they are many.

    Adapters, heads and whole models of one shape have files of one size, so that the size alone tells little.
    """
    size = file.stat().st_size
    starts = [0] if size <= 3 * SAMPLE else [0, (size - SAMPLE) // 2, size - SAMPLE]
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            digest.update(opened.read(3 * SAMPLE if len(starts) == 1 else SAMPLE))
    return f"{size} {digest.hexdigest()}"


def folder_facts(folder: Path) -> str:
    """Names, sizes and hashes of all files below a folder, hidden ones aside; of a file its own."""
    if folder.is_file():
        return f"{folder.name} {_fingerprint(folder)}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return "\n".join(f"{path.relative_to(folder)} {_fingerprint(path)}" for path in files)


def agree(facts: Mapping[str, str]) -> None:
    """Refuse to start where processes would do different things.

    facts: what is compared, by the name that the user knows it by. Compared are hashes; all processes call it with the same names.

    Raises:
      UserError: which facts differ from those of process 0, and in which processes.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8) for value in facts.values()])
    everyone = np.asarray(multihost_utils.process_allgather(digests))
    differing = [
        f"{name} (process {', '.join(map(str, others))})"
        for row, name in enumerate(facts)
        if (others := np.flatnonzero((everyone[:, row] != everyone[0, row]).any(-1)).tolist())
    ]
    if differing:
        raise UserError(f"the hosts differ from process 0 in {'; '.join(differing)}; give all of them the same and start again")


def prove(config: Config, rows: Sequence[str], **folders: Path) -> None:
    """`agree` on what every command reads: configuration, prompts, photos, checkpoint, reward and library versions.

    Args:
      config: the configuration.
      rows: digests of the rows that the command reads, such as those of prompts by `data.prompts.row_digests`.
      **folders: more files and folders, by the names that the user knows them by.

    Raises:
      UserError: the processes differ.
    """
    if jax.process_count() == 1:
        return
    reward = config.reward
    networks = [reward.folder()] if reward.faces else []
    files = [*networks, *(Path(name) for name in (reward.head, reward.vlm, reward.vlm_base, reward.vlm_prompt) if name)]
    agree({
        "the configuration": config.to_json(),
        "the prompts, photos or pairs": "\n".join(rows),
        "the checkpoint": folder_facts(config.model.folder()),
        "the reward": "\n".join(map(folder_facts, files)),
        **{f"the {name}": folder_facts(folder) for name, folder in folders.items()},
        **versions(),
    })


def to_host(tree: Any) -> Any:
    """Arrays of any sharding as numpy arrays, whole, on every process; all processes call it together."""
    gather = {}
    leaves, structure = jax.tree.flatten(tree)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            gather[place] = leaf
    found = multihost_utils.process_allgather(gather, tiled=True) if gather else {}
    whole = [found[place] if place in found else _local(leaf) for place, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, whole)


def _local(leaf: Any) -> np.ndarray:
    remote = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return np.asarray(leaf.addressable_data(0) if remote else leaf)


def to_device(tree: Any) -> Any:
    """Arrays that this process can use alone: those that several hold are gathered; all processes call it together."""
    alone = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return tree if alone else jax.tree.map(jnp.asarray, to_host(tree))


def any_process(mark: bool) -> bool:
    """Whether the mark is set in one process at least, known to all; all processes call it together."""
    return mark if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(mark))))


def of_all(value: Any) -> list[Any]:
    """What every process passes, in their order: values that JSON can hold, of any size; all processes call it together."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).ravel()
    everyone = np.asarray(multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text)))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]


def barrier(name: str) -> None:
    """Wait until every process has come to the place of this name (collective)."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@functools.cache
def processes_here() -> int:
    """Count the processes of this run on this machine, among which its memory is shared (collective at the first call)."""
    names = of_all(socket.gethostname())
    return names.count(names[jax.process_index()])


def memory_share(budget: int) -> int:
    """Divide a budget of bytes for one machine's memory among the processes of this run there (collective at the first call)."""
    return budget // processes_here()


def run_once(write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `write(*args, **kwargs)`, which only writes files, in process 0 alone; the others do not spend the time."""
    if jax.process_index() == 0:
        write(*args, **kwargs)


@contextlib.contextmanager
def written_once(folder: Path) -> Iterator[Path]:
    """Where a command that all processes run writes its files: the folder itself in process 0, one that is thrown away elsewhere."""
    if jax.process_index() == 0:
        yield folder
    else:
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside)


def say(text: str) -> None:
    """Print a result, once."""
    if jax.process_index() == 0:
        print(text)


COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX records after a program is compiled, before it runs


def give_back_after_compiling(least: float = 1.0) -> None:
    """From now on, what compiling a program took goes back to the system before the program runs.

    XLA frees hundreds of megabytes after a large program, and glibc keeps them: they then lie beside the program's own arrays, at the peak
    of the process. Without glibc nothing is done.

    Args:
      least: seconds of compilation below which it is left, since giving back takes up to a tenth of a second.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_: str | int) -> None:
        if event == COMPILED and seconds >= least:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
