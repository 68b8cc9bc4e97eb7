"""Identity-GRPO on RefAlign-1.3B: the recipe of Phantom-Wan-1.3B.

RefAlign publishes the same shift, guidance scales and preparation of photos as Phantom, and removes
the background of the photos first; photos without a background are up to the user.
`idgrpo-convert import --as refalign` builds the checkpoint from RefAlign's `model.safetensors` and
Wan's folder (see docs/checkpoints.md). The published weights have not been run.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `phantom_1_3b` with the kind of model refalign."""
    base = c.load(Path(__file__).with_name("phantom_1_3b.py"))
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, path="RefAlign-1.3B", kind="refalign")
    )
