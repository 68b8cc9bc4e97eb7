"""Shared by all tests: one CPU device, and shape annotations checked at run time.

Tests that need several devices start their own process: the number of devices is fixed when JAX starts.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["jax_idgrpo", "checkpoints_convert"], "beartype.beartype")
