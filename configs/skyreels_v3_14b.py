"""Identity-GRPO on SkyReels-V3-R2V-14B, which is distilled: 8 steps, no guidance, 24 fps.

The published weights have not been run.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return the few-step recipe with the weights sharded over 16 devices.

    For fewer devices pass `--mesh.data 1 --mesh.fsdp -1`. Evaluation uses the published solver,
    UniPC, and 720 x 1280 pixels.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b_few_step.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="SkyReels-V3-R2V-14B", kind="skyreels"),
        video=dataclasses.replace(base.video, fps=24),
        rollout=dataclasses.replace(base.rollout, micro_batch=64),
        evaluate=dataclasses.replace(
            base.evaluate, solver="unipc", frames=121, height=720, width=1280
        ),
        mesh=c.MeshConfig(data=-1, fsdp=16),
    )
