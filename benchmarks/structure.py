"""Count properties that make the package hard to enter, in the working tree or in a commit.

python benchmarks/structure.py [FOLDER]
"""

import argparse
import ast
import collections
from pathlib import Path

PACKAGES = ("jax_idgrpo", "checkpoints_convert")


def folder_of(module: str) -> str:
    """Return the folder of a module: the second part of its name, or the package itself."""
    parts = module.split(".")
    if parts[0] == "checkpoints_convert":
        return parts[0]
    return parts[1] if len(parts) > 2 else ""


def measure(root: Path) -> dict[str, str]:
    """Return the figures of a checkout by name."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    modules = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }
    edges: collections.Counter[tuple[str, str]] = collections.Counter()
    lines = long = bare = anything = 0
    lengths: dict[str, int] = {}
    for module, file in modules.items():
        text = file.read_text()
        lines += text.count("\n")
        long += sum(len(line) > 100 for line in text.splitlines())
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        nested = {
            id(inner)
            for outer in functions
            for inner in ast.walk(outer)
            if inner is not outer and isinstance(inner, ast.FunctionDef)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in PACKAGES
            ):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    target = folder_of(name if name in modules else node.module)
                    if target and folder_of(module) and target != folder_of(module):
                        edges[folder_of(module), target] += 1
            if isinstance(node, ast.FunctionDef) and id(node) not in nested:
                lengths[f"{module}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
                arguments = [*node.args.args, *node.args.kwonlyargs]
                given = [argument for argument in arguments if argument.arg not in ("self", "cls")]
                anything += sum(
                    "Any" in ast.unparse(argument.annotation)
                    for argument in given
                    if argument.annotation
                )
                anything += node.returns is not None and "Any" in ast.unparse(node.returns)
                public = not node.name.startswith("_")
                if public and len(given) >= 3 and "Args:" not in (ast.get_docstring(node) or ""):
                    bare += 1
    both = sorted({tuple(sorted(pair)) for pair in edges if pair[::-1] in edges})
    size = {
        name.rpartition(".")[2]: lengths[name]
        for name in lengths
        if name.endswith((".train.train", ".programs"))
    }
    return {
        "files at the top of the package": str(
            len([path for path in (root / "jax_idgrpo").iterdir() if path.is_file()])
        ),
        "imports between folders, in both directions": str(len(both))
        + (f" {both}" if both else ""),
        "lines": str(lines),
        "lines over 100 columns": f"{long} ({100 * long / lines:.1f} %)",
        "public functions of three or more parameters without Args:": str(bare),
        "Any in signatures": str(anything),
        **{f"lines of {name}": str(length) for name, length in sorted(size.items())},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count what makes the package hard to enter.")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path(__file__).parents[1],
        help="a checkout (default: this one)",
    )
    for name, value in measure(parser.parse_args().folder).items():
        print(f"| {name} | {value} |")
