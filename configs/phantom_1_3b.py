"""Identity-GRPO on Phantom-Wan-1.3B: the recipe of VACE with Phantom's shift and guidance.

The authors of Identity-GRPO published no settings for this model. `idgrpo-convert import --as
phantom` builds the checkpoint from Phantom-Wan-1.3B.pth and its Wan folder
(see docs/checkpoints.md).
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with shift 5.0 and guidance scales 5.0 (photos) and 7.5 (prompt).

    A velocity needs three branches of the transformer.
    """
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path="Phantom-Wan-1.3B-diffusers", kind="phantom"),
        rollout=dataclasses.replace(base.rollout, shift=5.0, guidance=7.5, image_guidance=5.0),
    )
