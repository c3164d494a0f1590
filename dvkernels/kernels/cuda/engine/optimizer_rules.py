"""Update rules (kernels/update_rules.py) on vectors in registers, of float32 and float64."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import types

from dvkernels.kernels import update_rules
from dvkernels.kernels.cuda.engine import inline_ptx
from dvkernels.kernels.cuda.engine.registers import Registers, Text, generate

__all__ = ["apply"]

_untyped: Any = types
_COUNT = update_rules.NUM_COEFFICIENTS


def _step(rule: int, gradient: Any, states: Any, coefficients: Any) -> Any:
    """Return the new parameter and the new slots: velocity, or first and second moment."""
    parameter, first, second = states
    if rule == update_rules.ADAM:
        return update_rules.adam_step(gradient, parameter, first, second, coefficients)
    if rule == update_rules.ADAGRAD:
        return *update_rules.adagrad_step(gradient, parameter, first, coefficients), second
    return *update_rules.sgd_step(rule, gradient, parameter, first, coefficients), second


def _simulated_apply(
    address: int, gradient: Any, parameter: Any, first: Any, second: Any, rule: int
) -> Any:
    float64s = (ctypes.c_double * _COUNT).from_address(address)
    with np.errstate(all="ignore"):
        return _step(
            rule, gradient, (parameter, first, second), [*map(gradient.dtype.type, float64s)]
        )


def _declare_apply(
    address: Any, vector: Any, parameter: Any, first: Any, second: Any, rule: int
) -> inline_ptx.Code:
    def emit(text: Text, numbers: Registers, gradient: Registers, *states: Registers) -> Any:
        coefficients = []
        for k in range(_COUNT):
            number = text.new("f64", 1)
            text.line("ld.b64", number.names[0], f"[{numbers.names[0]}+{8 * k}]")
            if gradient.kind == "f32":
                number = number.each("cvt.rn.f32.f64", kind="f32")
            coefficients.append(number)
        return _step(rule, gradient, states, coefficients)

    result = _untyped.UniTuple(vector, 3)
    return generate(result, [types.int64, *[vector] * 4], emit)


# Return the new parameter, first and second slot, lane by lane. The coefficients are float64s at
# an address.
apply = inline_ptx.device_function(_declare_apply, _simulated_apply, inline_ptx.READS)
