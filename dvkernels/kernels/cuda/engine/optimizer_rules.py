"""Update rules of SGD, Adam and AdamW on vectors in registers, of float32 and float64.

SGD: plain, with momentum, with Nesterov momentum. Adam: D. P. Kingma, J. Ba, ICLR 2015,
arXiv:1412.6980. AdamW (decoupled weight decay): I. Loshchilov, F. Hutter, ICLR 2019,
arXiv:1711.05101.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dvkernels.kernels import update_rules
from dvkernels.kernels.cuda.engine import intrinsics

__all__ = ["apply"]

_untyped: Any = types
_DOUBLE = ir.DoubleType()


def _simulated_apply(
    rule: int, gradient: Any, parameter: Any, first: Any, second: Any, numbers: int
) -> Any:
    real = gradient.dtype.type
    float64s = (ctypes.c_double * 7).from_address(numbers)
    values = [real(number) for number in float64s]
    complements = [real(1 - number) for number in float64s[1:3]]
    with np.errstate(all="ignore"):
        return _Rules(rule, values, complements, np.sqrt).step(gradient, parameter, first, second)


class _Rules:
    """Arithmetic of an update rule, on NumPy arrays or on emitted numbers."""

    def __init__(self, rule: int, numbers: Any, complements: Any, sqrt: Any) -> None:
        self.rule, self.numbers, self.complements, self.sqrt = rule, numbers, complements, sqrt

    def step(self, gradient: Any, parameter: Any, first: Any, second: Any) -> Any:
        """Return the new parameter and the new slots: velocity, or first and second moment."""
        if self.rule != update_rules.ADAM:
            rate, momentum, decay = self.numbers[:3]
            g = gradient + decay * parameter
            if self.rule == update_rules.PLAIN:
                return parameter - rate * g, first, second
            velocity = momentum * first + g
            direction = g + momentum * velocity if self.rule == update_rules.NESTEROV else velocity
            return parameter - rate * direction, velocity, second
        rate, beta_1, beta_2, epsilon, correction, decay, kept_share = self.numbers
        g = gradient + decay * parameter
        mean = beta_1 * first + self.complements[0] * g
        square = beta_2 * second + self.complements[1] * g * g
        denominator = self.sqrt(square) * correction + epsilon
        return kept_share * parameter - rate * mean / denominator, mean, square


def _operator(instruction: str) -> Callable[[_Number, _Number], _Number]:
    """Return the method that emits an instruction of LLVM on two numbers."""

    def emit(self: _Number, other: _Number) -> _Number:
        builder = self.builder
        return _Number(builder, getattr(builder, instruction)(self.value, other.value))

    return emit


class _Number:
    """Number in emitted LLVM code, with operators that emit instructions."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    __add__, __sub__ = _operator("fadd"), _operator("fsub")
    __mul__, __truediv__ = _operator("fmul"), _operator("fdiv")

    def sqrt(self) -> _Number:
        """Emit the square root, rounded to nearest."""
        name = f"llvm.nvvm.sqrt.rn.{'d' if self.value.type == _DOUBLE else 'f'}"
        root = intrinsics.call(self.builder, name, self.value.type, [self.value])
        return _Number(self.builder, root)


@intrinsics.twin(_simulated_apply, prefer_literal=True)
def apply(
    typing: Any, rule: Any, gradient: Any, parameter: Any, first: Any, second: Any, numbers: Any
) -> Any:
    """Return the new parameter, first and second slot, lane by lane.

    ``numbers`` is the address of seven float64.
    """
    result = _untyped.UniTuple(gradient, 3)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = context.get_value_type(gradient.dtype)
        base = builder.inttoptr(args[5], _DOUBLE.as_pointer())
        float64s = [builder.load(builder.gep(base, [ir.IntType(32)(k)]), align=8) for k in range(7)]
        complements = [builder.fsub(_DOUBLE(1.0), number) for number in float64s[1:3]]

        def rounded(number: Any) -> _Number:
            is_double = real == _DOUBLE
            return _Number(builder, number if is_double else builder.fptrunc(number, real))

        rules = _Rules(
            rule.literal_value,
            [*map(rounded, float64s)],
            [*map(rounded, complements)],
            _Number.sqrt,
        )
        lanes = []
        for k in range(gradient.count):
            states = [_Number(builder, builder.extract_value(arg, k)) for arg in args[1:5]]
            lanes.append([number.value for number in rules.step(*states)])
        vectors = [context.make_tuple(builder, gradient, [*of]) for of in zip(*lanes, strict=True)]
        return context.make_tuple(builder, result, vectors)

    return result(rule, gradient, gradient, gradient, gradient, types.int64), generate
