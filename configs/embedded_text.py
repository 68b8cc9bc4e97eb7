"""Train the bundled text encoder, a UMT5 of 0.1M parameters, and build its tokenizer.

It takes minutes on two CPU cores.
"""

from jax_idgrpo.config import (
    EMBEDDED,
    Config,
    DataConfig,
    FinetuneConfig,
    OptimizerConfig,
    RunConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(max_people=3, text_length=80),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=50, schedule="cosine", ema_decay=0.99),
        run=RunConfig(steps=800, save_every=400),
        finetune=FinetuneConfig(
            task="text",
            batch=32,
            out=str(EMBEDDED / "pipeline"),
            options=dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2),
        ),
    )
