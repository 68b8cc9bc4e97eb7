"""Count the cost of a program: FLOPs from its jaxpr, traffic from its compiled text.

The compiler's own analysis counts a loop body once. Here it is multiplied by the trip count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

# ---- arithmetic ----------------------------------------------------------------------------------


# Number of matrix products in cuDNN's flash attention. Forward: q k and weights v. Backward: q k
# again, and the products for the gradients of v, weights, q and k.
FLASH = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def flops(jaxpr: ClosedJaxpr) -> float:
    """Count the FLOPs of the matrix products and convolutions of a jaxpr, summed over all devices.

    Loop bodies are multiplied by their trip count, or counted once if it is unknown. `cond` counts
    its most expensive branch. A Pallas kernel is multiplied by the size of its grid. Dead code is
    excluded: a traced backward pass contains the gradients of frozen weights, which every compiler
    removes.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum((_flops(equation) for equation in jaxpr.eqns), 0.0)


def _flops(equation: JaxprEqn) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    if name in FLASH:
        q, k = (equation.invars[operand].aval.shape for operand in (0, 1))  # [B,N,K,d], [B,M,K,d]
        return 2.0 * FLASH[name] * math.prod(q) * k[1]
    inner = [_count(body) for value in parameters.values() for body in _bodies(value)]
    if name == "cond":
        return max(inner, default=0.0)
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "shard_map":
        return parameters["mesh"].size * sum(inner)
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid) * sum(inner)
    if name in ("custom_vjp_call", "custom_jvp_call"):
        return inner[0]
    return sum(inner, 0.0)


def _bodies(value: object) -> Iterator[Jaxpr | ClosedJaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _bodies(part)


# ---- traffic -------------------------------------------------------------------------------------

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "copy-done",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "all-to-all-done",
    "async-done",
    "async-update",
    "opt-barrier",
}
COLLECTIVES = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
    "ragged-all-to-all": 1,
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic per device.

    Attributes:
      moved: bytes read from and written to the device's memory.
      received: bytes received from other devices. An all-reduce counts twice.
    """

    moved: float = 0.0
    received: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.moved + other.moved, self.received + other.received)

    def times(self, count: int) -> "Traffic":
        """Return the traffic of `count` runs."""
        return Traffic(self.moved * count, self.received * count)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


def traffic(text: str) -> Traffic:
    """Count the traffic of a compiled program.

    A slice of a large array counts only the slice. `text` is the result of `Compiled.as_text()`.
    """
    computations, entry = _parse(text)
    known: dict[str, Traffic] = {}

    def run(name: str) -> Traffic:
        if name not in known:
            shapes = {line.name: line.shape for line in computations[name]}
            known[name] = sum((one(line, shapes) for line in computations[name]), Traffic())
        return known[name]

    def one(line: Instruction, shapes: dict[str, str]) -> Traffic:
        if line.opcode in NOTHING:
            return Traffic()
        if line.opcode == "while":
            return run(_called(line, "body")).times(_trips(line, computations))
        if line.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
            pair = ("true_computation", "false_computation")
            names = (
                re.findall(r"%([\w.\-]+)", branches[1])
                if branches
                else [_called(line, word) for word in pair]
            )
            return max((run(name) for name in names), key=lambda branch: branch.moved)
        if line.opcode in ("call", "async-start"):
            return run(_called(line, "to_apply" if "to_apply=" in line.rest else "calls"))
        name = line.opcode.removesuffix("-start")
        if name in COLLECTIVES:
            size = _size(line.shape) / (
                2 if line.opcode.endswith("-start") and line.shape.startswith("(") else 1
            )
            return Traffic(2 * size, COLLECTIVES[name] * size)
        operands = [shapes[operand] for operand in line.operands]
        if line.opcode == "dynamic-slice":
            return Traffic(2 * _size(line.shape))
        if line.opcode == "dynamic-update-slice":
            return Traffic(2 * _size(operands[1]))
        if line.opcode == "fusion":
            return Traffic(_fusion(line, operands, computations[_called(line, "calls")]))
        if line.opcode == "copy-start":
            return Traffic(_size(operands[0]))
        return Traffic(_size(line.shape) + sum(map(_size, operands)))

    return run(entry)


def _fusion(line: Instruction, operands: list[str], body: list[Instruction]) -> float:
    """Count the bytes that a fusion reads and writes.

    Operands that are only sliced, and results that are only updated in part, count as the slice.
    """
    shapes = {inner.name: inner.shape for inner in body}
    total, written = 0.0, _size(line.shape)
    for inner in body:
        if inner.root and inner.opcode == "dynamic-update-slice":
            written = _size(shapes[inner.operands[1]])
        if inner.opcode != "parameter":
            continue
        users = [user for user in body if inner.name in user.operands]
        if users and all(user.opcode == "dynamic-slice" for user in users):
            total += sum(_size(user.shape) for user in users)
        elif users and all(
            user.opcode == "dynamic-update-slice" and user.operands[0] == inner.name
            for user in users
        ):
            pass
        else:
            total += _size(inner.shape)
    return total + written


def _size(shape: str) -> float:
    """Count the bytes of a shape, or of a tuple of shapes, in the device's main memory.

    Arrays in other memory spaces are marked S(n) and excluded.
    """
    total = 0.0
    for kind, axes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if kind in BYTES and "S(" not in layout:
            total += BYTES[kind] * math.prod(int(size) for size in axes.split(",") if size)
    return total


def _called(line: Instruction, word: str) -> str:
    found = re.search(rf"\b{word}=%?([\w.\-]+)", line.rest)
    assert found, f"{line.opcode} {line.name} names no {word}"
    return found[1]


def _trips(line: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Return the trip count of a loop.

    It is the compiler's annotation, else the largest integer constant of the loop condition, else
    1.
    """
    if said := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(said[1])
    bounds: list[int] = []

    def look(name: str) -> None:
        for inner in computations[name]:
            if (
                inner.opcode == "constant"
                and inner.shape.startswith(("s32", "u32"))
                and inner.rest.lstrip("(").split(")")[0].isdigit()
            ):
                bounds.append(int(inner.rest.lstrip("(").split(")")[0]))
            if inner.opcode in ("fusion", "call"):
                look(_called(inner, "calls" if inner.opcode == "fusion" else "to_apply"))

    look(_called(line, "condition"))
    return max(bounds, default=1)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse a compiled program into instructions by computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            shape, rest = (
                _balanced(found[3]) if found[3].startswith("(") else found[3].split(" ", 1)
            )
            opcode, rest = rest.strip().split("(", 1)
            given, _ = _balanced("(" + rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", given))
            lines.append(Instruction(found[2], shape, opcode, operands, "(" + rest, bool(found[1])))
    return computations, entry


def _balanced(text: str) -> tuple[str, str]:
    """Split `text` after the parenthesis that closes its first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"no closing parenthesis: {text[:80]}")
