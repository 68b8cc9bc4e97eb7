"""Checkpoints: the bits come back, damage is survived, a changed configuration is refused by name."""

import subprocess

import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.training.checkpoint import open_checkpoints, restore, save
from tests.helpers.checkpoint import WIDE, make_state, same

# Reads that fail leave coroutines of orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def manager(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        yield manager


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this machine allows one to be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_what_is_stored_stays(small_disk):
    with open_checkpoints(small_disk, keep=2) as manager:
        save(manager, 3, make_state(3))
        with pytest.raises(
            UserError, match=r"checkpoint .*/6: no space left on the disk; .* free space"
        ):
            save(manager, 6, make_state(6, 10 * WIDE))
    with open_checkpoints(small_disk, keep=2) as manager:
        assert same(restore(manager, make_state(0)), make_state(3))
        save(manager, 6, make_state(6))
        assert same(restore(manager, make_state(0)), make_state(6))
