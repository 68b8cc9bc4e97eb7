"""What is shipped: imports point one way only, the metadata names what runs, the scripts exist, exact versions satisfy the ranges."""

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for package in ("jax_idgrpo", "checkpoints_convert")
    for path in (ROOT / package).rglob("*.py")
}


def ours(path: Path) -> set[str]:
    """Our modules that `path` imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from the root"
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            }
    return found & set(MODULES)


@pytest.mark.parametrize(
    "module", sorted(set(MODULES) - {"jax_idgrpo"})
)  # the package itself exposes the others lazily
def test_no_module_imports_the_package_as_a_whole(module):
    assert "jax_idgrpo" not in ours(MODULES[module])


def docstring_lines(tree):
    """Count the lines of all strings that are statements."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return sum(
        node.end_lineno - node.lineno + 1
        for node in statements
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_are_short(module):
    """A module has at most 450 lines, docstrings not counted. Only networks are longer."""
    text = MODULES[module].read_text()
    lines = len(text.splitlines()) - docstring_lines(ast.parse(text))
    assert lines <= 450 or module.startswith("jax_idgrpo.models."), f"{module} has {lines} lines"


def test_few_files_at_the_top():
    files = [path for path in (ROOT / "jax_idgrpo").iterdir() if path.is_file()]
    assert len(files) <= 12, sorted(path.name for path in files)


@pytest.mark.parametrize(("module", "known"), [("flow", set()), ("grpo", {"jax_idgrpo.flow"})])
def test_mathematics_stands_apart(module, known):
    assert ours(MODULES[f"jax_idgrpo.{module}"]) <= known


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def exact_versions() -> dict[str, Version]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs)
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_exact_versions_satisfy_the_ranges_of_what_both_commands_install():
    versions, extras = exact_versions(), PROJECT["optional-dependencies"]
    assert {"jax-idgrpo[data]", "jax-idgrpo[faces]"} <= set(extras["test"])
    for requirement in requirements(
        PROJECT["dependencies"] + extras["test"] + extras["data"] + extras["faces"]
    ):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(
                versions[requirement.name.lower().replace("_", "-")]
            ), requirement


def test_constraints_hold_no_address():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "@" not in text


def test_no_resolver_can_pick_a_broken_pair():
    (jax,) = (r for r in requirements(PROJECT["dependencies"]) if r.name == "jax")
    (flax,) = (r for r in requirements(PROJECT["dependencies"]) if r.name == "flax")
    assert "0.11.1" not in jax.specifier
    assert "0.10.2" in jax.specifier
    assert "0.11.0" in jax.specifier
    assert "0.12.8" in flax.specifier


def test_torch_is_asked_for_exactly():
    (torch,) = (
        r for r in requirements(PROJECT["optional-dependencies"]["test"]) if r.name == "torch"
    )
    assert str(torch.specifier) == "==2.13.0"
    assert str(exact_versions()["torch"]) == "2.13.0"


@pytest.mark.parametrize("script", sorted(PROJECT["scripts"]))
def test_scripts_are_importable(script):
    module, function = PROJECT["scripts"][script].split(":")
    tree = ast.parse(MODULES[module].read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def imported(tree: ast.AST) -> set[str]:
    """Return the full names of the modules and members that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_test_files_have_a_tier_and_share_code_through_helpers():
    """A test file is in a tier and imports no other one. A test is slow by its directory alone."""
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [
            name for name in imported(tree) if name.startswith("tests.") and ".test_" in name
        ], path
        if path.name.startswith("test_"):
            assert path.parent.parent == ROOT / "tests", path
            assert path.parent.name in ("unit", "integration", "parity", "slow"), path
            marks = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert "slow" not in marks, f"{path}: move slow tests to tests/slow"


def test_embedded_files_are_shipped_and_small():
    files = [
        path for path in (ROOT / "jax_idgrpo" / "synthetic" / "assets").rglob("*") if path.is_file()
    ]
    assert files, "the embedded model set is missing"
    assert sum(path.stat().st_size for path in files) <= 20e6
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["jax_idgrpo"]
    shipped = {path for pattern in patterns for path in (ROOT / "jax_idgrpo").glob(pattern)}
    assert set(files) <= shipped
