"""The learned head: what does not matter to it, that it stays finite and inside what it saw, and its training from a CSV to a reward."""

import shutil

from jax_idgrpo.training.finetune import finetune
from tests.helpers.reward_head import configuration, write_pairs


def test_a_stopped_run_ends_with_the_head_of_an_undisturbed_one(tmp_path):
    config = configuration(write_pairs(tmp_path / "pairs", 8, 0, "train"), steps=40)
    finetune(config, tmp_path / "run")
    stored = tmp_path / "run" / "export" / "head.safetensors"
    whole = stored.read_bytes()
    stored.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    finetune(config, tmp_path / "run")
    assert stored.read_bytes() == whole
