"""GRPO on the bundled models of synthetic people; the whole run takes minutes on two CPU cores."""

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return the configuration; jax_idgrpo/config describes every field."""
    return c.Config(
        model=c.ModelConfig(path="embedded", remat="full", rank=8, alpha=8.0, unroll=True),
        data=c.DataConfig(prompts="embedded:rl", max_people=3, text_length=80),
        video=c.VideoConfig(frames=9, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(
            prompts=4,
            group=8,
            steps=12,
            guidance=1.0,
            window="random",
            window_size=3,
            start_noise="shared",
        ),
        grpo=c.GrpoConfig(clip=1e-3, kl=0.004),
        optimizer=c.OptimizerConfig(learning_rate=3e-3, ema_decay=0.9),
        reward=c.RewardConfig(),
        evaluate=c.EvaluateConfig(prompts="embedded:eval", videos=4, steps=12, batch=32),
        run=c.RunConfig(steps=70, save_every=20, keep=2, sample_every=20),
    )
