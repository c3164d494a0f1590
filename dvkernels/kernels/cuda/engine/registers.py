"""Generator of straight-line PTX: vectors in registers, whose operators emit instructions.

Additions, products, quotients and roots say how they round, so the assembler fuses none of them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine.inline_ptx import Code

__all__ = ["Registers", "Text", "generate"]


class Text:
    """Instructions, and the registers that they use."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts: collections.Counter[str] = collections.Counter()

    def line(self, instruction: str, *operands: str) -> None:
        """Append an instruction."""
        self._lines.append(f"{instruction} {', '.join(operands)};")

    def new(self, kind: str, count: int) -> Registers:
        """Declare registers of a PTX type; those of one size are compatible."""
        size = "pred" if kind == "pred" else f"b{kind[1:]}"
        start = self._counts[size]
        self._counts[size] += count
        return Registers(self, kind, [f"%{size}_{k}" for k in range(start, start + count)])

    def __str__(self) -> str:
        declared = [f".reg .{size} %{size}_<{count}>;" for size, count in self._counts.items()]
        return "\n".join(["{", *declared, *self._lines, "}"])


class Registers(arithmetic.VectorOperators):
    """Vector of numbers of one PTX type, each in a register, or one number for every lane."""

    def __init__(self, text: Text, kind: str, names: Sequence[str]) -> None:
        self.text, self.kind, self.names = text, kind, [*names]
        self.count = len(self.names)

    def each(self, instruction: str, *others: Any, kind: str = "") -> Registers:
        """Emit an instruction for each lane."""
        operands = [self, *others]
        lanes = max(len(one.names) for one in operands if isinstance(one, Registers))
        result = self.text.new(kind or self.kind, lanes)
        rows = zip(result.names, *(_spread(one, lanes) for one in operands), strict=True)
        for row in rows:
            self.text.line(instruction, *row)
        return result

    def emit(self, name: str, other: Any) -> Registers:
        """Emit an operation with other numbers, or with an integer in every lane."""
        if name in ("lt", "gt", "nan"):
            return self.each(f"setp.{name}.{self.kind}", other, kind="pred")
        if name in ("and", "or", "xor", "shl"):
            is_predicate = self.kind == "pred"
            return self.each(f"{name}.{'pred' if is_predicate else f'b{self.kind[1:]}'}", other)
        rounding = ".rn" if self.kind[0] == "f" else ".lo" * (name == "mul")
        return self.each(f"{name}{rounding}.{self.kind}", other)

    def sqrt(self) -> Registers:
        """Emit the square roots: ``numpy.sqrt`` of an object calls this method."""
        return self.each(f"sqrt.rn.{self.kind}")

    def choose(self, where: Any, other: Any) -> Registers:
        """Emit these numbers where the predicate holds, else those of ``other``."""
        return self.each(f"selp.{self.kind}", other, where)

    def negate_even(self) -> Registers:
        """Emit the numbers, those of even lanes with the other sign."""
        negated = self.take(range(0, self.count, 2)).each(f"neg.{self.kind}").names
        names = [negated[k // 2] if k % 2 == 0 else name for k, name in enumerate(self.names)]
        return Registers(self.text, self.kind, names)

    def bits(self, kind: str) -> Registers:
        """Emit the same bits as numbers of another type of their size."""
        return self.each(f"mov.b{kind[1:]}", kind=kind)

    def take(self, lanes: Iterable[int]) -> Registers:
        """Return these lanes."""
        return Registers(self.text, self.kind, [self.names[lane] for lane in lanes])

    def join(self, other: Registers) -> Registers:
        """Return all lanes, then those of ``other``."""
        return Registers(self.text, self.kind, [*self.names, *other.names])


def _spread(one: Any, lanes: int) -> Sequence[str]:
    """Return the operand of each lane: registers, or an integer constant."""
    if not isinstance(one, Registers):
        return [str(one)] * lanes
    return one.names * lanes if len(one.names) == 1 else one.names


def generate(result: Any, operands: Sequence[Any], emit: Callable[..., Any]) -> Code:
    """Return the code that a function emits; see :class:`Code` for the types.

    ``emit`` is called with the text and the registers of each operand, and returns vectors: the
    result's numbers, one after another.
    """
    text = Text()
    first = len(_kinds(result))
    given = []
    for operand in operands:
        kinds = _kinds(operand)
        given.append(Registers(text, kinds[0], [f"${first + k}" for k in range(len(kinds))]))
        first += len(kinds)
    vectors = emit(text, *given)
    # An operand may share its register with a result: all are read before any result is written.
    numbers = [one.bits(one.kind) if one.names[0].startswith("$") else one for one in vectors or ()]
    names = [(name, one.kind) for one in numbers for name in one.names]
    for k, (name, kind) in enumerate(names):
        text.line(f"mov.b{kind[1:]}", f"${k}", name)
    return Code(str(text), result, operands)


def _kinds(numba_type: Any) -> list[str]:
    """Return the PTX type of each number: ``float32`` is ``f32``, ``int64`` is ``s64``."""
    if hasattr(numba_type, "dtype"):
        return _kinds(numba_type.dtype) * int(numba_type.count)
    name = str(numba_type)
    if name == "none":
        return []
    size = name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return [{"int": "s", "uint": "u", "float": "f"}[name[: -len(size)]] + size]
