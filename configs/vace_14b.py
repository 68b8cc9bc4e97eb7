"""Identity-GRPO on Wan2.1-VACE-14B: the recipe of the 1.3B model with sharded weights."""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with the weights sharded over 16 devices.

    For fewer devices pass `--mesh.data 1 --mesh.fsdp -1`.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="Wan2.1-VACE-14B-diffusers"),
        rollout=dataclasses.replace(base.rollout, micro_batch=64),
        mesh=c.MeshConfig(data=-1, fsdp=16),
    )
