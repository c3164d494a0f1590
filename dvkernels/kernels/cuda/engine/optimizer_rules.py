"""The rules of the fused optimizers, on vectors in registers: float32 and float64 only."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dvkernels.kernels import optimizer_checks
from dvkernels.kernels.cuda.engine import intrinsics

__all__ = ["apply"]

_untyped: Any = types
_DOUBLE = ir.DoubleType()


def _plain_apply(
    rule: int, gradient: Any, parameter: Any, first: Any, second: Any, numbers: int
) -> Any:
    real = gradient.dtype.type
    told = (ctypes.c_double * 7).from_address(numbers)
    values = [real(number) for number in told]
    rest = [real(1 - number) for number in told[1:3]]
    with np.errstate(all="ignore"):
        return _Rules(rule, values, rest, np.sqrt).step(gradient, parameter, first, second)


class _Rules:
    """The arithmetic, over anything that has it: NumPy's arrays, or what emits code."""

    def __init__(self, rule: int, numbers: Any, rest: Any, sqrt: Any) -> None:
        self.rule, self.numbers, self.rest, self.sqrt = rule, numbers, rest, sqrt

    def step(self, gradient: Any, parameter: Any, first: Any, second: Any) -> Any:
        """Return the new parameter and the new states."""
        if self.rule != optimizer_checks.ADAM:
            rate, momentum, decay = self.numbers[:3]
            slope = gradient + decay * parameter
            if self.rule == optimizer_checks.PLAIN:
                return parameter - rate * slope, first, second
            speed = momentum * first + slope
            along = slope + momentum * speed if self.rule == optimizer_checks.NESTEROV else speed
            return parameter - rate * along, speed, second
        rate, beta_1, beta_2, epsilon, correction, decay, kept = self.numbers
        slope = gradient + decay * parameter
        mean = beta_1 * first + self.rest[0] * slope
        square = beta_2 * second + self.rest[1] * slope * slope
        root = self.sqrt(square) * correction + epsilon
        return kept * parameter - rate * mean / root, mean, square


class _Number:
    """A number of the code that is being emitted."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: _Number) -> _Number:
        return _Number(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: _Number) -> _Number:
        return _Number(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: _Number) -> _Number:
        return _Number(self.builder, self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: _Number) -> _Number:
        return _Number(self.builder, self.builder.fdiv(self.value, other.value))

    def sqrt(self) -> _Number:
        """Emit the square root, rounded to the nearest."""
        suffix = "d" if self.value.type == _DOUBLE else "f"
        return _Number(
            self.builder,
            intrinsics.call(
                self.builder, f"llvm.nvvm.sqrt.rn.{suffix}", self.value.type, [self.value]
            ),
        )


@intrinsics.twin(_plain_apply, prefer_literal=True)
def apply(
    typing: Any, rule: Any, gradient: Any, parameter: Any, first: Any, second: Any, numbers: Any
) -> Any:
    """Return the new parameter, first and second state, lane by lane; the numbers are float64."""
    result = _untyped.UniTuple(gradient, 3)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = context.get_value_type(gradient.dtype)
        place = builder.inttoptr(args[5], _DOUBLE.as_pointer())
        told = [builder.load(builder.gep(place, [ir.IntType(32)(k)]), align=8) for k in range(7)]
        rest = [builder.fsub(_DOUBLE(1.0), number) for number in told[1:3]]

        def narrow(number: Any) -> _Number:
            is_double = real == _DOUBLE
            return _Number(builder, number if is_double else builder.fptrunc(number, real))

        rules = _Rules(rule.literal_value, [*map(narrow, told)], [*map(narrow, rest)], _Number.sqrt)
        lanes = []
        for k in range(gradient.count):
            states = [_Number(builder, builder.extract_value(arg, k)) for arg in args[1:5]]
            lanes.append([number.value for number in rules.step(*states)])
        vectors = [context.make_tuple(builder, gradient, [*of]) for of in zip(*lanes, strict=True)]
        return context.make_tuple(builder, result, vectors)

    return result(rule, gradient, gradient, gradient, gradient, types.int64), generate
