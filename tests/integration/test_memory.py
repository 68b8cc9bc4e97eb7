"""What compiling took does not stay with the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, jax
from jax_idgrpo.parallel.hosts import trim_heap_after_compile

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if not hasattr(libc, "malloc_trim"):
    raise SystemExit(5)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

pieces = [libc.malloc(16384) for _ in range(20000)]     # 312 MiB in pieces that glibc takes from its heap
for piece in pieces:
    ctypes.memset(piece, 1, 16384)
for piece in pieces[:-1]:                               # the last keeps the end of the heap where it is
    libc.free(piece)
if LISTENING:
    trim_heap_after_compile(least=0.0)
before = resident()
jax.jit(lambda x: x + 1)(1.0)
print(before - resident())
"""


@pytest.mark.parametrize("listening", [True, False])
def test_freed_memory_goes_back_when_a_program_is_compiled(listening):
    program = PROGRAM.replace("LISTENING", str(listening))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 250) == listening
