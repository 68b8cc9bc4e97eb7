"""Read the pickled requests of other trainers' HTTP scorers without executing anything in them.

verl-omni and flow_grpo post `pickle.dumps({"images": [JPEG, ...], "prompts": [TEXT, ...], ...})` and
read a pickle back. A pickle is a program. Here its operations are listed by `pickletools.genops`,
which only splits bytes, and a stack of plain values is kept by hand. Operations that import or call
something leave an inert description, of which only an array of texts is understood: flow_grpo's
prompts are one. No module is imported, no function is called, and no object is built.

Sources: verl-project/verl-omni `verl_omni/utils/reward_score/http_scorer_client.py`;
yifan123/flow_grpo `flow_grpo/rewards.py`; PEP 3154 and PEP 574 for the operations.
"""

import dataclasses
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jax_idgrpo.rewards.exchange import Refused

_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME", "READONLY_BUFFER")
_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_BUFFERS = ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer")


class _Mark:
    """A place on the stack."""


class _Name(NamedTuple):
    """A name that the pickle would import."""

    text: str


@dataclasses.dataclass
class _Call:
    """A call that the pickle would make, with the state that it would then set."""

    function: Any
    arguments: Any
    state: Any = None


def read(body: bytes) -> dict[str, Any]:
    """Read a pickled dict of plain values.

    Args:
      body: the pickle, of any protocol up to 5.

    Returns:
      The values by name. What is not plain is an inert description.

    Raises:
      Refused: the body is no pickle of a dict, or uses operations that no such request needs.
    """
    try:
        found = _Machine().run(body)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Refused(f"the request is no pickle that is read ({type(error).__name__})") from None
    if type(found) is not dict or not all(type(name) is str for name in found):
        raise Refused("the request is no pickled dict of images and prompts")
    return found


class _Machine:
    """The stack and the memo of a pickle whose operations are carried out by hand."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, body: bytes) -> Any:
        """Carry out the operations, and return the value that the pickle describes."""
        for operation, argument, _ in pickletools.genops(body):
            name = operation.name
            if name == "STOP":
                (value,) = self.stack
                return value
            if name in (*_NUMBERS, *_TEXTS, *_BYTES):
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                self.stack.append(self._top(_TUPLES[name]))
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in _IGNORED:
                raise Refused(f"the pickled request uses the operation {name}; send plain values")
        raise ValueError("no end")

    def _top(self, count: int) -> tuple[Any, ...]:
        """Take the last values off the stack."""
        if count > len(self.stack):
            raise ValueError("empty stack")
        cut = len(self.stack) - count
        values = self.stack[cut:]
        del self.stack[cut:]
        return tuple(values)

    def _marked(self) -> list[Any]:
        """Take the values since the last mark off the stack."""
        values: list[Any] = []
        while not isinstance(value := self.stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def global_name(self, argument: str) -> None:
        self.stack.append(_Name(argument))

    def stack_global(self, _: object) -> None:
        module, name = self._top(2)
        self.stack.append(_Name(f"{module} {name}"))

    def call(self, _: object) -> None:
        self.stack.append(_Call(*self._top(2)))

    def build(self, _: object) -> None:
        (state,) = self._top(1)
        if type(self.stack[-1]) is not _Call:
            raise TypeError("a state of nothing")
        self.stack[-1].state = state

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("no list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(values) % 2:
            raise TypeError("no dict")
        for name in values[::2]:
            if type(name) not in (str, int):
                raise TypeError("no plain key")
        self.stack[-1].update(zip(values[::2], values[1::2]))


_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda machine, _: machine.push(_Mark()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "LIST": lambda machine, _: machine.push(machine._marked()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine._marked())),
    "APPEND": lambda machine, _: machine.extend(list(machine._top(1))),
    "APPENDS": lambda machine, _: machine.extend(machine._marked()),
    "SETITEM": lambda machine, _: machine.update(list(machine._top(2))),
    "SETITEMS": lambda machine, _: machine.update(machine._marked()),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    **dict.fromkeys(
        ("PUT", "BINPUT", "LONG_BINPUT"),
        lambda machine, number: machine.memo.__setitem__(number, machine.stack[-1]),
    ),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, number: machine.push(machine.memo[number])
    ),
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def texts(value: object) -> list[str]:
    """Return the texts of a list, a tuple, or a described numpy array.

    Raises:
      Refused: the value is none of these.
    """
    found = _array(value) if isinstance(value, _Call) else value
    if not isinstance(found, list | tuple) or not all(type(text) is str for text in found):
        raise Refused("the prompts are no list of texts")
    return list(found)


def _array(call: _Call) -> list[Any]:
    """Read the values of a described one-dimensional array of texts or of objects."""
    try:
        if call.function.text in _ARRAYS:
            _, shape, dtype, _, content = call.state
        elif call.function.text in _BUFFERS:
            content, dtype, shape, _ = call.arguments
        else:
            raise Refused("the prompts are no list of texts")
        code, order = dtype.arguments[0], dtype.state[1]
        if code.startswith("O"):
            return list(content)
        if not re.fullmatch(r"U[1-9]\d{0,6}", code) or type(content) not in (bytes, bytearray):
            raise Refused("the prompts are no array of texts")
        (count,), width = shape, 4 * int(code[1:])
        if count * width != len(content):
            raise Refused("the prompts are no array of texts")
        coding = {"<": "utf-32-le", ">": "utf-32-be"}[order]
        parts = (content[at : at + width] for at in range(0, len(content), width))
        return [part.decode(coding).rstrip("\0") for part in parts]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise Refused("the prompts are no array of texts") from None
