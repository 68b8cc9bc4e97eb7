"""Run commands of `idgrpo` one after the other, and list the files that this process writes below a folder.

The last line of the output is that list in JSON, without checkpoints, of which every process writes its part.

python -m tests.helpers.writes_worker FOLDER COMMAND CONFIG ... [+ COMMAND CONFIG ...]
"""

import itertools
import json
import os
import sys
from pathlib import Path

import jax
from jax._src import cache_key

from jax_idgrpo import cli
from jax_idgrpo.parallel import hosts

# Process 0 compiles, and the others take its programs. JAX names them by the machine's description, which differs between the processes.
jax.config.update("jax_share_binary_between_hosts", True)
jax.config.update("jax_share_binary_between_hosts_timeout_ms", 600_000)
cache_key._hash_accelerator_config = lambda digest, devices: digest.update(
    repr([device.id for device in devices.flat]).encode()
)

folder = Path(sys.argv[1]).absolute()
written: set[str] = set()


def note(path: object) -> None:
    """Note a path below the folder. One that is a folder belongs to a temporary file without a name."""
    if not isinstance(path, str | os.PathLike) or Path(path).is_dir():
        return
    if Path(path).absolute().is_relative_to(folder):
        written.add(str(Path(path).absolute().relative_to(folder)))


def hook(event: str, given: tuple) -> None:
    """Note a file that is opened for writing or renamed."""
    if event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR):
        note(given[0])
    elif event == "os.rename":
        note(given[1])


sys.addaudithook(hook)
for joined, words in itertools.groupby(sys.argv[2:], lambda word: word == "+"):
    if not joined:
        sys.argv = ["idgrpo", *words]
        cli.main()
        if hosts.is_distributed():
            hosts.barrier("the command ends in all processes")
print(json.dumps(sorted(path for path in written if "checkpoints" not in Path(path).parts)))
