"""Shared by all tests: one CPU device, shape annotations checked at run time, and the tiers.

A test's tier is its directory: `unit` (no training run, no process, no download), `integration` (runs, commands and processes), `parity`
(against the published code in PyTorch) and `slow` (minutes; marked `slow` here). Code that several test files share is in `helpers`.

Tests that need several devices start their own process: the number of devices is fixed when JAX starts.
"""

import os
from pathlib import Path

# Compiling takes most of the time: what one test or process compiled, another one reads.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
)  # compiling takes most of the time: half as long

import flax.struct
import jax
import pytest
from jaxtyping import install_import_hook

_dataclass = flax.struct.dataclass


def _struct(cls=None, **options):
    """flax's struct whose constructor is not checked: JAX rebuilds structs with shapes or shardings in the places of arrays."""
    if cls is None:
        return lambda cls: _struct(cls, **options)
    made = _dataclass(cls, **options)
    made.__no_type_check__ = True
    return made


flax.struct.dataclass = _struct
pytest.register_assert_rewrite("tests.helpers")
install_import_hook(["jax_idgrpo", "checkpoints_convert"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    """Mark every test in tests/slow as slow."""
    slow = Path(__file__).parent / "slow"
    for item in items:
        if slow in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Programs are forgotten after each file: a worker that keeps them all holds gigabytes."""
    yield
    jax.clear_caches()
