"""Preference pairs and a short training run of the learned head."""

from jax_idgrpo import config as c
from jax_idgrpo.preferences import synthesis


def write_pairs(folder, count, seed, split):
    """Clips against the same with faces exchanged or doubled; a third of the pairs are automatic, and rightly labelled."""
    synthesis.write_pairs(
        folder, split, count, seed, "swap,duplicate", automatic=1 / 3, careless=0.0
    )
    return folder / "pairs.csv"


def configuration(csv, held_out="", steps=60, **options):
    """Return the configuration of a training run of the head on the pairs of a CSV."""
    return c.Config(
        data=c.DataConfig(max_people=3),
        video=c.VideoConfig(frames=9, height=64, width=64),
        optimizer=c.OptimizerConfig(learning_rate=2e-3, ema_decay=0.0),
        finetune=c.FinetuneConfig(
            task="reward_face",
            batch=16,
            options={"pairs": str(csv), "held_out": str(held_out)} | options,
        ),
        run=c.RunConfig(steps=steps, save_every=20, keep=5, sample_every=0),
    )
