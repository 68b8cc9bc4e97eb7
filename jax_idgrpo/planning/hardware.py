"""Describe chips, and make devices of absent machines for compilation."""

import contextlib
import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.attention import fused

# ---- the machine ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of a chip.

    Attributes:
      memory: bytes of memory.
      flops: peak bfloat16 FLOP/s.
      bandwidth: memory bandwidth in bytes/s.
      links: total bandwidth of its links in bytes/s.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float


# JAX's device kind -> chip. Published figures:
# cloud.google.com/tpu/docs/system-architecture-tpu-vm, NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(32e9, 275e12, 1.23e12, 300e9),
    "TPU v5 lite": Chip(16e9, 197e12, 0.82e12, 200e9),
    "TPU v5": Chip(95e9, 459e12, 2.77e12, 600e9),
    "TPU v6 lite": Chip(32e9, 918e12, 1.64e12, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 312e12, 2.04e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 989e12, 3.35e12, 450e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4.8e12, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Figures of a GPU that its compiler needs in addition to `Chip`. Sizes are in bytes."""

    device: str  # JAX's device kind
    capability: str
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory_per_core: int


# Figures: openxla/xla, xla/backends/gpu/target_config/specs.
HOPPER = ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 52_428_800, 233_472)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 1.41, 41_943_040, 167_936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *HOPPER),
    "h200": Gpu("NVIDIA H200", *HOPPER),
}

# Options to compile for an absent GPU. The compiler selects between its own kernels and cuBLAS by
# timing them on the device. Without a device, only cuBLAS is used.
ABSENT_GPU = {"xla_gpu_enable_triton_gemm": False}


def _target(gpu: Gpu) -> str:
    """Return the description of a GPU for the compiler (text format of `GpuTargetConfigProto`)."""
    chip = CHIPS[gpu.device]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core} clock_rate_ghz: {gpu.clock_ghz}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory_per_core}
          shared_memory_per_block_optin: {gpu.shared_memory_per_core - 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          l2_cache_size: {gpu.l2_cache} device_memory_size: {chip.memory:.0f} memory_bandwidth: {chip.bandwidth:.0f}
          cuda_compute_capability {{ {gpu.capability} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{gpu.device}"
    """


def devices(topology: str) -> list[jax.Device]:
    """Return the devices of a topology.

    Examples are "v5p:4x4x4" for TPUs, "h200:8" for 8 GPUs, "h200:4x8" for 4 hosts of 8 GPUs,
    "cpu:8" for 8 virtual CPU devices, and "gpu" for the GPUs of this machine.

    Raises:
      UserError: the topology is unknown, or its compiler or devices are not available.
    """
    name, _, shape = topology.partition(":")
    if name == "cpu":
        return _cpus(topology, shape)
    if name in GPUS:
        return _gpus(topology, GPUS[name], shape)
    if name == "gpu":
        try:
            return jax.devices("gpu")
        except RuntimeError:
            raise UserError(
                "--topology gpu: JAX finds no GPU here; install the cuda extra on a machine that has one, or name GPUs, as in h200:8"
            ) from None
    return _tpus(topology)


def _cpus(topology: str, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"[1-9]\d*", shape):
        raise UserError(f"--topology {topology}: cpu takes a number of devices, as in cpu:8")
    with contextlib.suppress(RuntimeError):  # JAX is initialised already
        jax.config.update("jax_num_cpu_devices", int(shape))
    here = jax.devices("cpu")
    if len(here) < int(shape):
        raise UserError(
            f"--topology {topology}: JAX has started with {len(here)} CPU devices; plan in a process of its own"
        )
    return here[: int(shape)]


def _gpus(topology: str, gpu: Gpu, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise UserError(
            f"--topology {topology}: GPUs take a number, or hosts x GPUs of each, as in h200:8 or h200:4x8"
        )
    from jax.experimental import topologies

    # Suppress repeated warnings of the compiler about the missing driver.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    # Keep the plugin from searching for a GPU before it compiles.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=_target(gpu),
            topology=f"1x{shape}" if "x" in shape else f"1x1x{shape}",
        ).devices
        tokens = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
        # Raises an error if cuDNN is missing.
        jax.eval_shape(
            functools.partial(fused, lengths=None, implementation="cudnn"), tokens, tokens, tokens
        )
    except RuntimeError as error:
        raise UserError(
            f"--topology {topology}: no GPU compiler with cuDNN is installed; pip install 'jax-idgrpo[cuda]' (JAX says: {error})"
        ) from None
    return found


# Placeholder environment: libtpu warns if these variables are unset.
NOWHERE = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def _tpus(topology: str) -> list[jax.Device]:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # this machine may have no TPU
    for name, value in NOWHERE.items():
        os.environ.setdefault(name, value)
    # Only one process may use a TPU, but several may compile.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                f"--topology {topology}: the TPU compiler is not installed; pip install 'jax-idgrpo[tpu]'"
            ) from None
        raise UserError(
            f"--topology {topology}: no such slice; use one such as v5e:4x4, v6e:8x8, v5p:4x4x4, h200:8, cpu:8, or gpu"
        ) from None
