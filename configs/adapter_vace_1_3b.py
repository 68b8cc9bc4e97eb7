r"""Train an adapter of Wan2.1-VACE-1.3B on your own clips, before GRPO with `vace_1_3b`.

    idgrpo finetune adapter_vace_1_3b --workdir runs/adapter --model.path model \
        --reward.faces photographs --finetune.options '{"clips": "clips"}'

Clips have the size of `vace_1_3b`'s training videos. The values have not been tried on the published
weights; watch `held_out_loss` and stop when it rises.
"""

import dataclasses
from pathlib import Path

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return `vace_1_3b` with the task "adapter"."""
    base = c.load(Path(__file__).with_name("vace_1_3b.py"))
    return dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, warmup=50, ema_decay=0.99),
        run=dataclasses.replace(base.run, steps=2000, save_every=100, sample_every=500),
        finetune=c.FinetuneConfig(task="adapter", batch=8, options={"clips": "clips"}),
    )
