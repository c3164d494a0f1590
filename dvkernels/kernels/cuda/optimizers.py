"""Reduction of the gradients and the step of an optimizer, in one launch and one pass over memory.

For N replicas of S bytes and two moments: N S of gradients read, 3 S of state read from the first
copies, 3 S written to each. The copies must be equal before; they are equal after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic, optimizer_checks
from dvkernels.kernels.cuda.engine import elements, intrinsics, job, launch_table, optimizer_rules
from dvkernels.kernels.cuda.engine.call import Call
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
    numbers = optimizer_checks.sgd_coefficients(parameters, learning_rate, momentum, weight_decay)
    rule = optimizer_checks.sgd_rule(velocities, nesterov)
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
    numbers = optimizer_checks.adam_coefficients(
        parameters, step, learning_rate, beta_1, beta_2, epsilon, weight_decay, decoupled
    )
    slots = [first_moments, second_moments]
    _step(
        "optimizers.adam", optimizer_checks.ADAM, gradients, parameters, slots, numbers, op, stream
    )


def _step(
    verb: str,
    rule: int,
    gradients: Groups,
    parameters: Groups,
    slots: Sequence[Groups],
    numbers: Sequence[optimizer_checks.Coefficients],
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
    step = optimizer_checks.check(verb, placed[0], placed[1], placed[2:], numbers, op)
    if step is None:
        return
    divisor = step.num_replicas if step.op is ReduceOp.MEAN else 1
    with call.ordered() as order:
        for (dtype, held), groups in step.groups.items():
            counts = job.Counts(step.num_replicas, step.num_copies, step.num_replicas, divisor)
            code = arithmetic.type_code(dtype)
            # The states are read, too; the numbers are at least as many as any rule has.
            told = [*held, *[0.0] * (7 - len(held))]
            job.run(order, kernel(rule, code), code, groups, counts, len(groups[0]), told)


@functools.cache
def kernel(rule: int, code: int) -> Callable[..., None]:
    """Return the function that runs on the device, not yet compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = intrinsics.VECTOR_NBYTES // itemsize
    add = elements.combiner(arithmetic.ADD, code)
    header, record = launch_table.HEADER, launch_table.RECORD
    num_slots = (0, 1, 1, 2)[rule]

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.hold(words)
        num_replicas, num_copies = launch_table.entry(table, 2), launch_table.entry(table, 3)
        divisor, per_thread = launch_table.entry(table, 5), launch_table.entry(table, 6)
        width, numbers = launch_table.entry(table, 7), table + 8 * launch_table.entry(table, 8)
        own = num_replicas
        second = own + num_copies * (1 if num_slots > 0 else 0)
        third = own + num_copies * num_slots
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for piece in range(cuda.blockIdx.x, launch_table.entry(table, 0), cuda.gridDim.x):
            item = launch_table.locate(table, piece)
            number = piece - launch_table.entry(table, header + 2 * item)
            where = table + 8 * launch_table.entry(table, header + 2 * item + 1)
            num_axes, before = launch_table.entry(where, 0), launch_table.entry(where, 1)
            units, after = launch_table.entry(where, 2), launch_table.entry(where, 3)
            arrays = where + 8 * record
            begin = number * per_thread * threads
            end = min(begin + per_thread * threads, units)
            if num_axes == 0:
                for vector in range(begin + thread, end, threads):
                    place = before * itemsize + 16 * vector
                    g = elements.load(launch_table.entry(arrays, 0) + place, code, True)
                    for k in range(1, num_replicas):
                        h = elements.load(launch_table.entry(arrays, k) + place, code, True)
                        g = add(g, h)
                    g = elements.divide(g, divisor, code)
                    p = elements.load(launch_table.entry(arrays, own) + place, code, True)
                    s = elements.load(launch_table.entry(arrays, second) + place, code, True)
                    t = elements.load(launch_table.entry(arrays, third) + place, code, True)
                    p, s, t = optimizer_rules.apply(rule, g, p, s, t, numbers)
                    for k in range(num_copies):
                        elements.store(launch_table.entry(arrays, own + k) + place, p, code, True)
                        if num_slots > 0:
                            elements.store(
                                launch_table.entry(arrays, second + k) + place, s, code, True
                            )
                        if num_slots > 1:
                            elements.store(
                                launch_table.entry(arrays, third + k) + place, t, code, True
                            )
                # What is left of vectors before and after, in the first piece.
                begin, end = 0, before + after if number == 0 else 0
            for unit in range(begin + thread, end, threads):
                skipped = units * per_vector if num_axes == 0 and unit >= before else 0
                i = unit + skipped
                shift = launch_table.shift(where, width, 0, i, itemsize)
                a = elements.load(launch_table.entry(arrays, 0) + shift, code, False)
                for k in range(1, num_replicas):
                    shift = launch_table.shift(where, width, k, i, itemsize)
                    b = elements.load(launch_table.entry(arrays, k) + shift, code, False)
                    a = add(a, b)
                a = elements.divide(a, divisor, code)
                shift = launch_table.shift(where, width, own, i, itemsize)
                x = elements.load(launch_table.entry(arrays, own) + shift, code, False)
                shift = launch_table.shift(where, width, second, i, itemsize)
                y = elements.load(launch_table.entry(arrays, second) + shift, code, False)
                shift = launch_table.shift(where, width, third, i, itemsize)
                z = elements.load(launch_table.entry(arrays, third) + shift, code, False)
                x, y, z = optimizer_rules.apply(rule, a, x, y, z, numbers)
                for k in range(num_copies):
                    shift = launch_table.shift(where, width, own + k, i, itemsize)
                    elements.store(launch_table.entry(arrays, own + k) + shift, x, code, False)
                    if num_slots > 0:
                        shift = launch_table.shift(where, width, second + k, i, itemsize)
                        elements.store(
                            launch_table.entry(arrays, second + k) + shift, y, code, False
                        )
                    if num_slots > 1:
                        shift = launch_table.shift(where, width, third + k, i, itemsize)
                        elements.store(
                            launch_table.entry(arrays, third + k) + shift, z, code, False
                        )

    return run
