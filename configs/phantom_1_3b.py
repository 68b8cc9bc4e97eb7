"""Identity-GRPO on Phantom-Wan-1.3B. Its authors published no settings for it: the recipe of VACE with Phantom's own shift and guidance.

`idgrpo-convert import Phantom-Wan-1.3B.pth` and its Wan folder makes the checkpoint, with `--as phantom`; see docs.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """As `vace_1_3b`; three branches per velocity, the photos' scale 5.0 and the prompt's 7.5, shift 5.0."""
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="Phantom-Wan-1.3B-diffusers", kind="phantom"),
        rollout=dataclasses.replace(base.rollout, shift=5.0, guidance=7.5, image_guidance=5.0),
    )
