"""What is shipped: imports point one way only, the metadata names what runs, the scripts exist, exact versions satisfy the ranges."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


def test_imports_point_one_way():
    """The contracts of pyproject.toml: layers in one direction, and no circles within them."""
    ran = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    "script",
    [*sorted(ROOT.glob("launch/*.sh")), *sorted(ROOT.glob(".ci/*"))],
    ids=lambda path: path.name,
)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
