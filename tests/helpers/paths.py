"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"  # arrays of the published code
