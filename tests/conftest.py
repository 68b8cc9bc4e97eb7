"""Shared by all tests: one CPU device, and shape annotations checked at run time.

Tests that need several devices start their own process: the number of devices is fixed when JAX starts.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")    # compiling takes most of the time: half as long

import flax.struct
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
install_import_hook(["jax_idgrpo", "checkpoints_convert"], "beartype.beartype")
