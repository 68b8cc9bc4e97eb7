"""Short runs of one or several processes."""

from tests.helpers.processes import start

CONFIG = """
from jax_idgrpo import config as c

def get_config():
    return c.Config(
        model=c.ModelConfig(rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(prompts=2, group=2, steps=3, guidance=1.0, window="fixed", window_size=1),
        grpo=c.GrpoConfig(kl=0.1),
        optimizer=c.OptimizerConfig(learning_rate=3e-3, ema_decay=0.5),
        reward=c.RewardConfig(frames=2),
        run=c.RunConfig(steps=10, save_every=2, sample_every=5),
    )
"""


def idgrpo(folder, command, processes, devices, *words, own=None):
    """Start a command on folder/short.py.

    Args:
      folder: of the run, and of the compiled programs.
      command: name of the command.
      processes: how many are started.
      devices: CPU devices of each process.
      *words: more words of every command line.
      own: more words for some of the processes, by number.
    """
    return start(
        ["-m", "jax_idgrpo", command, folder / "short.py", *words], processes, devices, folder, own
    )


def train(folder, name, processes, devices, *words, own=None):
    """Start training in folder/name; the other arguments are those of `idgrpo`."""
    return idgrpo(folder, "train", processes, devices, "--workdir", folder / name, *words, own=own)


def make_folder(tmp_path_factory):
    """Return a new folder with the configuration short.py."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "short.py").write_text(CONFIG)
    return folder
