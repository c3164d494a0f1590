"""Inline PTX: instructions and types in, values in a kernel out.

Only this module knows how the compiler, numba-cuda, makes values of inline PTX: with an intrinsic
that emits LLVM's inline assembly. Of another compiler it needs a call such as CUDA C++'s ``asm``.

The simulator runs kernels as Python and has no PTX: there, each device function is its
``simulated`` twin, and addresses are those of the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import extending, types

from dvkernels.kernels.cuda.engine import simulator

__all__ = [
    "EFFECT",
    "NOTHING",
    "READS",
    "Code",
    "calls",
    "device_function",
]

# What code does besides computing its result, as LLVM's attributes.
NOTHING, READS, EFFECT = "readnone nounwind", "readonly nounwind", "convergent noduplicate"
_CONSTRAINTS = {"i32": "r", "i64": "l", "float": "f", "double": "d"}


class Code(NamedTuple):
    """PTX in which ``$0``, ``$1``... are registers: of the results, then of the operands.

    The result, and each operand, is a 32-bit or 64-bit number or a tuple of such; its numbers have
    consecutive registers. Labels and registers that the code declares within braces are its own.
    Without text, the result is the first operand.
    """

    text: str
    result: Any = types.void
    operands: Sequence[Any] = ()


def device_function(
    code: Code | Callable[..., Code],
    simulated: Callable[..., Any] | None = None,
    effect: str = EFFECT,
) -> Any:
    """Return the device function that executes inline PTX: this code, or what a function returns.

    The function is given each argument's value where it is a constant, else its type. Arguments
    that are no operands come last.

    Code whose effect is ``NOTHING`` depends on its operands alone, and code that ``READS`` on the
    memory too: it may be executed once for many uses, or not at all. Code with an ``EFFECT`` is
    executed where it stands: no access to memory is moved across it, and it is not copied, so a
    barrier remains one, and neither LLVM nor the assembler unrolls a loop around it. (A GPU hides
    latency by running other warps, which need registers: unrolled by LLVM, the minimum of int8 took
    152 registers per thread on sm_90 and the sum of float16 128; rolled, 84 and 80.)
    """
    if simulator.IS_ON:
        return simulated

    def declare(*given: Any) -> Code:
        return code if isinstance(code, Code) else code(*given)

    def typed(typing: Any, *given: Any) -> Any:
        found = declare(*(getattr(one, "literal_value", one) for one in given))

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = [
                number
                for arg, _ in zip(args, found.operands, strict=False)
                for number in _numbers(builder, arg)
            ]
            if not found.text:
                return args[0]
            if found.result == types.void:
                _emit(builder, found.text, [], numbers, effect)
                return context.get_dummy_value()
            whole = context.get_value_type(found.result)
            kinds = [kind for kind, _ in _paths(whole)]
            return _whole(builder, whole, _emit(builder, found.text, kinds, numbers, effect))

        constants = given[len(found.operands) :]
        return found.result(*found.operands, *constants), generate

    # Numba asks the signature for the number of arguments.
    if isinstance(code, Code):
        names = [f"operand_{k}" for k in range(len(code.operands))]
    else:
        names = [*inspect.signature(code).parameters]
    parameters = ["typing", *names]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    vars(typed)["__signature__"] = inspect.Signature(
        [inspect.Parameter(name, kind) for name in parameters]
    )
    function: Any = extending.intrinsic(prefer_literal=True)(typed)
    function.declare, function.simulated = declare, simulated  # for tests of the PTX
    return function


def calls(function: Callable[..., Any], signature: Any, vector: Any) -> Any:
    """Return the device function that calls a function of two elements on each pair of two vectors.

    The function, not compiled, becomes part of the kernel. An element is a number of ``vector``,
    two where the signature says that it is complex; a smaller integer is a wider one there.
    """
    kind, number = signature.return_type, vector.dtype
    unit = 2 if isinstance(kind, types.Complex) else 1

    def call(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature_of_call: Any, args: Any) -> Any:
            # No caching: Numba would confuse functions of equal code and different globals.
            compiled = context.compile_subroutine(builder, function, signature, caching=False)
            sides = [_numbers(builder, arg) for arg in args]
            results: list[Any] = []
            for k in range(0, len(sides[0]), unit):
                pair = []
                for side in sides:
                    element = side[k]
                    if unit == 2:
                        parts = context.make_complex(builder, kind)
                        parts.real, parts.imag = side[k : k + 2]
                        element = parts._getvalue()
                    pair.append(
                        element if unit == 2 else context.cast(builder, element, number, kind)
                    )
                result = context.call_internal(builder, compiled.fndesc, signature, pair)
                if unit == 2:
                    results += (builder.extract_value(result, part) for part in range(2))
                else:
                    results.append(context.cast(builder, result, kind, number))
            return _whole(builder, context.get_value_type(vector), results)

        return vector(vector, vector), generate

    return extending.intrinsic(call)


def _whole(builder: Any, kind: Any, numbers: Sequence[Any]) -> Any:
    """Emit the value of an LLVM type, whose numbers these are."""
    if not isinstance(kind, ir.ArrayType):
        return numbers[0]
    value = ir.Constant(kind, ir.Undefined)
    for (_, path), number in zip(_paths(kind), numbers, strict=True):
        value = builder.insert_value(value, number, path)
    return value


def _paths(kind: Any, path: tuple[int, ...] = ()) -> Any:
    """Yield the type and the indices of each number of an LLVM type."""
    if isinstance(kind, ir.ArrayType):
        for k in range(kind.count):
            yield from _paths(kind.element, (*path, k))
    else:
        yield kind, path


def _numbers(builder: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, path) if path else value for _, path in _paths(value.type)]


def _emit(builder: Any, text: str, results: Any, numbers: Any, effect: str) -> list[Any]:
    """Emit inline assembly, and return its results."""
    constraints = [f"={_CONSTRAINTS[str(kind)]}" for kind in results]
    constraints += [_CONSTRAINTS[str(number.type)] for number in numbers]
    if effect == EFFECT:
        constraints.append("~{memory}")
    result = ir.VoidType()
    if results:
        result = ir.LiteralStructType(results) if len(results) > 1 else results[0]
    function = ir.FunctionType(result, [number.type for number in numbers])
    if effect == EFFECT:  # the assembler unrolls loops too
        text = f'.pragma "nounroll";\n{text}'
    text = text.replace('"', r"\22")  # as LLVM writes a quotation mark in a string
    call = builder.asm(function, text, ",".join(constraints), numbers, side_effect=effect == EFFECT)
    for attribute in effect.split():
        set.add(call.attributes, attribute)  # llvmlite's own ``add`` does not know ``noduplicate``
    if len(results) < 2:
        return [call]
    return [builder.extract_value(call, k) for k in range(len(results))]
