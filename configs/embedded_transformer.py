"""Train the bundled VACE transformer of 1.9M parameters by flow matching on synthetic clips.

It requires the VAE and the text encoder (`embedded_vae.py`, `embedded_text.py`) and takes about ten
minutes on two CPU cores. `embedded_transformer_long.py` continues the training.
"""

from jax_idgrpo.config import (
    EMBEDDED,
    Config,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    VideoConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(path=str(EMBEDDED / "pipeline"), unroll=True),
        data=DataConfig(max_people=3, text_length=80),
        video=VideoConfig(frames=9, height=64, width=64, fps=8),
        rollout=RolloutConfig(shift=3.0, steps=16, guidance=2.0),
        optimizer=OptimizerConfig(
            learning_rate=1.2e-3,
            beta2=0.99,
            weight_decay=0.01,
            warmup=100,
            schedule="cosine",
            ema_decay=0.998,
        ),
        run=RunConfig(steps=2800, save_every=400, sample_every=1000),
        finetune=FinetuneConfig(
            task="transformer",
            batch=16,
            out=str(EMBEDDED / "pipeline"),
            options=dict(
                num_layers=5,
                num_heads=4,
                head_dim=32,
                ffn_dim=384,
                freq_dim=64,
                vace_layers=[0, 2],
                pool=6144,
                face_weight=3.0,
                text_dropout=0.1,
            ),
        ),
    )
