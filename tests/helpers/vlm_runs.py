"""A vision-language reward in a folder, and the configuration that uses it."""

from jax_idgrpo import config as c
from tests.helpers import vlm_folders

TEXT = "\nHow alike are the faces?\n<|SA_reward|>\nEND\n"


def configured(folder, **changes):
    """Return the reward configuration that uses the models of `folder`."""
    return c.RewardConfig(
        faces="",
        vlm=str(folder / "reward"),
        vlm_base=str(folder / "base"),
        vlm_dtype="float32",
        **changes,
    )


def make_folder(tmp_path_factory):
    """A base and a released reward with its text."""
    root = tmp_path_factory.mktemp("vlm")
    vlm_folders.write_base(root / "base")
    vlm_folders.write_released(root / "base", root / "reward")
    (root / "reward" / "prompt.txt").write_text(TEXT)
    return root
