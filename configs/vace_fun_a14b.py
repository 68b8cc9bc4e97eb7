"""Identity-GRPO on Wan2.2-VACE-Fun-A14B, which has two experts of 14B.

Two of the 20 denoising steps are stochastic and trained. A training step trains the high-noise
expert (13 steps) or the low-noise one (7 steps), in turn.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b_fast` with the published shift and guidance, sharded over 16 devices.

    For fewer devices pass `--mesh.data 1 --mesh.fsdp -1`.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b_fast.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="Wan2.2-VACE-Fun-A14B"),
        rollout=dataclasses.replace(
            base.rollout, micro_batch=64, shift=12.0, guidance=5.0, window_low_noise=0.5
        ),
        mesh=c.MeshConfig(data=-1, fsdp=16),
    )
