"""Reduction of the gradients and the step of an optimizer, in one launch and one pass over memory.

For N replicas of S bytes and two moments: N S of gradients read, 3 S of state read from the first
copies, 3 S written to each. The copies must be equal before; they are equal after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic, steps
from dvkernels.kernels.cuda import elements, jobs, memory, rules, tables
from dvkernels.kernels.cuda.calls import Call
from dvkernels.reduce_op import ReduceOp

__all__ = ["adam", "kernel", "sgd"]

cuda: Any = numba_cuda  # its functions carry no types
Groups = Sequence[Sequence[Any]]


def sgd(
    gradients: Groups,
    parameters: Groups,
    velocities: Groups | None = None,
    *,
    learning_rate: float | Sequence[float],
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    op: ReduceOp | str = "mean",
    stream: Any = None,
) -> None:
    """Reduce gradients and take a step of gradient descent, as ``kernels.cpu.optimizers.sgd``.

    Without ``shares``: scale the gradients before, and take their sum.

    ``stream`` is one stream, or None for the current ones; see :mod:`dvkernels.kernels.cuda`.
    """
    slots = [] if velocities is None else [velocities]
    numbers = steps.sgd_numbers(parameters, learning_rate, momentum, weight_decay)
    rule = steps.sgd_rule(velocities, nesterov)
    _step("optimizers.sgd", rule, gradients, parameters, slots, numbers, op, stream)


def adam(
    gradients: Groups,
    parameters: Groups,
    first_moments: Groups,
    second_moments: Groups,
    *,
    step: int | Sequence[int],
    learning_rate: float | Sequence[float],
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    op: ReduceOp | str = "mean",
    stream: Any = None,
) -> None:
    """Reduce gradients and take a step of Adam or AdamW, as ``kernels.cpu.optimizers.adam``.

    ``stream`` is one stream, or None for the current ones; see :mod:`dvkernels.kernels.cuda`.
    """
    numbers = steps.adam_numbers(
        parameters, step, learning_rate, beta_1, beta_2, epsilon, weight_decay, decoupled
    )
    slots = [first_moments, second_moments]
    _step("optimizers.adam", steps.ADAM, gradients, parameters, slots, numbers, op, stream)


def _step(
    verb: str,
    rule: int,
    gradients: Groups,
    parameters: Groups,
    slots: Sequence[Groups],
    numbers: Sequence[steps.Numbers],
    op: Any,
    stream: Any,
) -> None:
    call = Call(verb, stream)
    placed = [
        [call.place(group, f"{verb}, {name} {k}", what) for k, group in enumerate(groups)]
        for groups, name, what in (
            (gradients, "gradient", "replica"),
            (parameters, "parameter", "copy"),
            *((slot, "slot", "copy") for slot in slots),
        )
    ]
    step = steps.check(verb, placed[0], placed[1], placed[2:], numbers, op)
    if step is None:
        return
    divisor = step.num_replicas if step.op is ReduceOp.MEAN else 1
    with call.ordered() as order:
        for (dtype, held), groups in step.groups.items():
            counts = jobs.Counts(step.num_replicas, step.num_copies, step.num_replicas, divisor)
            code = arithmetic.type_code(dtype)
            # The states are read, too; the numbers are at least as many as any rule has.
            told = [*held, *[0.0] * (7 - len(held))]
            jobs.run(order, kernel(rule, code), code, groups, counts, len(groups[0]), told)


@functools.cache
def kernel(rule: int, code: int) -> Callable[..., None]:
    """Return the function that runs on the device, not yet compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = memory.VECTOR_NBYTES // itemsize
    add = elements.combiner(arithmetic.ADD, code)
    header, record = tables.HEADER, tables.RECORD
    num_slots = (0, 1, 1, 2)[rule]

    def run(words):  # type: ignore[no-untyped-def]
        table = tables.hold(words)
        num_replicas, num_copies = tables.entry(table, 2), tables.entry(table, 3)
        divisor, per_thread = tables.entry(table, 5), tables.entry(table, 6)
        width, numbers = tables.entry(table, 7), table + 8 * tables.entry(table, 8)
        own = num_replicas
        second = own + num_copies * (1 if num_slots > 0 else 0)
        third = own + num_copies * num_slots
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for piece in range(cuda.blockIdx.x, tables.entry(table, 0), cuda.gridDim.x):
            item = tables.locate(table, piece)
            number = piece - tables.entry(table, header + 2 * item)
            where = table + 8 * tables.entry(table, header + 2 * item + 1)
            num_axes, before = tables.entry(where, 0), tables.entry(where, 1)
            units, after = tables.entry(where, 2), tables.entry(where, 3)
            arrays = where + 8 * record
            begin = number * per_thread * threads
            end = min(begin + per_thread * threads, units)
            if num_axes == 0:
                for vector in range(begin + thread, end, threads):
                    place = before * itemsize + 16 * vector
                    g = elements.load(tables.entry(arrays, 0) + place, code, True)
                    for k in range(1, num_replicas):
                        h = elements.load(tables.entry(arrays, k) + place, code, True)
                        g = add(g, h)
                    g = elements.divide(g, divisor, code)
                    p = elements.load(tables.entry(arrays, own) + place, code, True)
                    s = elements.load(tables.entry(arrays, second) + place, code, True)
                    t = elements.load(tables.entry(arrays, third) + place, code, True)
                    p, s, t = rules.apply(rule, g, p, s, t, numbers)
                    for k in range(num_copies):
                        elements.store(tables.entry(arrays, own + k) + place, p, code, True)
                        if num_slots > 0:
                            elements.store(tables.entry(arrays, second + k) + place, s, code, True)
                        if num_slots > 1:
                            elements.store(tables.entry(arrays, third + k) + place, t, code, True)
                # What is left of vectors before and after, in the first piece.
                begin, end = 0, before + after if number == 0 else 0
            for unit in range(begin + thread, end, threads):
                skipped = units * per_vector if num_axes == 0 and unit >= before else 0
                i = unit + skipped
                shift = tables.shift(where, width, 0, i, itemsize)
                a = elements.load(tables.entry(arrays, 0) + shift, code, False)
                for k in range(1, num_replicas):
                    shift = tables.shift(where, width, k, i, itemsize)
                    b = elements.load(tables.entry(arrays, k) + shift, code, False)
                    a = add(a, b)
                a = elements.divide(a, divisor, code)
                shift = tables.shift(where, width, own, i, itemsize)
                x = elements.load(tables.entry(arrays, own) + shift, code, False)
                shift = tables.shift(where, width, second, i, itemsize)
                y = elements.load(tables.entry(arrays, second) + shift, code, False)
                shift = tables.shift(where, width, third, i, itemsize)
                z = elements.load(tables.entry(arrays, third) + shift, code, False)
                x, y, z = rules.apply(rule, a, x, y, z, numbers)
                for k in range(num_copies):
                    shift = tables.shift(where, width, own + k, i, itemsize)
                    elements.store(tables.entry(arrays, own + k) + shift, x, code, False)
                    if num_slots > 0:
                        shift = tables.shift(where, width, second + k, i, itemsize)
                        elements.store(tables.entry(arrays, second + k) + shift, y, code, False)
                    if num_slots > 1:
                        shift = tables.shift(where, width, third + k, i, itemsize)
                        elements.store(tables.entry(arrays, third + k) + shift, z, code, False)

    return run
