"""Identity-GRPO on Wan2.1-VACE-1.3B with the values of the official recipe.

The recipe is that of github.com/alibaba/identity-grpo. Set `--model.path` to the checkpoint,
`--data.prompts` to a CSV, and `--reward.faces` to a folder of face networks for photographs.
"""

from jax_idgrpo import config as c


def get_config() -> c.Config:
    """Return the configuration.

    Training: 33 frames of 240 x 416, 256 videos per step in groups of 8, two updates per rollout.
    Evaluation: 81 frames of 480 x 832.
    """
    return c.Config(
        model=c.ModelConfig(
            path="Wan2.1-VACE-1.3B-diffusers", dtype="bfloat16", remat="full", rank=32, alpha=32.0
        ),
        data=c.DataConfig(prompts="prompts.csv", max_people=4, text_length=512),
        video=c.VideoConfig(frames=33, height=240, width=416, fps=16),
        rollout=c.RolloutConfig(
            prompts=32,
            group=8,
            micro_batch=32,
            steps=25,
            shift=3.0,
            guidance=4.5,
            window="all",
            final_step="sde",
        ),
        grpo=c.GrpoConfig(clip=1e-3, kl=0.004, advantage_clip=5.0, advantage_eps=1e-4, updates=2),
        optimizer=c.OptimizerConfig(
            learning_rate=1e-4,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=1e-4,
            max_norm=1.0,
            ema_decay=0.9487,
        ),
        reward=c.RewardConfig(faces="faces"),
        evaluate=c.EvaluateConfig(
            prompts="test.csv", videos=1, steps=50, batch=2, frames=81, height=480, width=832
        ),
        run=c.RunConfig(steps=115, seed=42, save_every=5, sample_every=5),
    )
