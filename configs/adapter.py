r"""Train an adapter on your own clips, as `idgrpo ingest` writes them, before GRPO.

    idgrpo finetune configs/adapter.py --workdir runs/adapter \
        --finetune.options '{"clips": "clips"}'
    idgrpo train configs/quickstart.py --workdir runs/after \
        --model.adapter runs/adapter/export

The values are for the bundled model; `adapter_vace_1_3b.py` has those for Wan2.1-VACE-1.3B.
"""

from jax_idgrpo import config as c


def get_config() -> c.Config:
    return c.Config(
        model=c.ModelConfig(path="embedded", rank=8, alpha=8.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=9, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(guidance=1.0),
        optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup=20, ema_decay=0.99),
        reward=c.RewardConfig(),
        evaluate=c.EvaluateConfig(steps=12, batch=4),
        run=c.RunConfig(steps=600, save_every=100, sample_every=200),
        finetune=c.FinetuneConfig(task="adapter", batch=16, options={"clips": "clips"}),
    )
