"""SGD, Adam and AdamW fused with the reduction of the gradients: one launch, one pass over memory.

For N replicas of S bytes and two moments: N S of gradients are read, 3 S of parameters and moments
are read from the first copies, and 3 S are written to each copy. Copies must be equal before the
call; they are equal after it. The update rules are in engine/optimizer_rules.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from numba import cuda as numba_cuda

from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cuda.engine import (
    elements,
    intrinsics,
    job,
    launch_table,
    loops,
    optimizer_rules,
    reducers,
)
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
    """Reduce gradients and take a step of gradient descent, as ``kernels.cpu.optimizers.sgd`` does.

    There is no parameter ``shares``: scale the gradients before the call, and reduce with
    ``op="sum"``.

    ``stream`` is one stream, or None for the current streams; see :mod:`dvkernels.kernels.cuda`.
    """
    states = [parameters] if velocities is None else [parameters, velocities]
    numbers = update_rules.sgd_coefficients(parameters, learning_rate, momentum, weight_decay)
    rule = update_rules.sgd_rule(velocities is not None, nesterov)
    take_step("optimizers.sgd", (rule, numbers), gradients, states, op, stream)


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
    """Reduce gradients and take a step of Adam or AdamW, as ``kernels.cpu.optimizers.adam`` does.

    ``stream`` is one stream, or None for the current streams; see :mod:`dvkernels.kernels.cuda`.
    """
    numbers = update_rules.adam_coefficients(
        parameters, step, learning_rate, beta_1, beta_2, epsilon, weight_decay, decoupled
    )
    states = [parameters, first_moments, second_moments]
    take_step("optimizers.adam", (update_rules.ADAM, numbers), gradients, states, op, stream)


def take_step(
    verb: str,
    rule: update_rules.Rule,
    gradients: Groups,
    states: Sequence[Groups],
    op: Any,
    stream: Any = None,
    *,
    is_checked: bool = False,
) -> None:
    """Take a step of any rule, as ``take_step`` of the CPU twin does."""
    number, coefficients = rule
    call = Call(verb, stream)
    arrays = [
        [call.register(group, f"{verb}, {name} {k}", what) for k, group in enumerate(groups)]
        for groups, name, what in (
            (gradients, "gradient", "replica"),
            (states[0], "parameter", "copy"),
            *((slot, "slot", "copy") for slot in states[1:]),
        )
    ]
    step: update_rules.CheckedStep | None
    if is_checked:
        step = update_rules.grouped(arrays[0], arrays[1:], coefficients, op)
    else:
        step = update_rules.check(verb, arrays[0], arrays[1:], coefficients, op)
    if step is None:
        return
    divisor = step.num_replicas if step.op is ReduceOp.MEAN else 1
    with call.ordered() as work_stream:
        for (dtype, numbers_of_group), groups in step.groups.items():
            counts = job.Counts(step.num_replicas, step.num_copies, step.num_replicas, divisor)
            code = arithmetic.type_code(dtype)
            # Parameters and slots are read too. Seven numbers: as many as the longest rule takes.
            padded = [*numbers_of_group, *[0.0] * (7 - len(numbers_of_group))]
            job.run(work_stream, kernel(number, code), code, groups, counts, len(groups[0]), padded)


@functools.cache
def kernel(rule: int, code: int) -> Callable[..., None]:
    """Return the kernel of an update rule (update_rules) and an element type, not compiled."""
    itemsize = arithmetic.dtype_of(code).itemsize

    @intrinsics.inlined
    def element_address(place, k):  # type: ignore[no-untyped-def]
        record, width, number = place
        offset = launch_table.byte_offset(record, width, k, number, itemsize)
        return launch_table.entry(launch_table.addresses(record), k) + offset

    step_two = _stepper(rule, code, 2, loops.dense_address)
    step_vector = _stepper(rule, code, 1, loops.dense_address)
    step_element = _stepper(rule, code, 0, element_address)

    @intrinsics.inlined
    def vectors(table, record, begin, end):  # type: ignore[no-untyped-def]
        addresses, width = launch_table.addresses(record), 16 * THREADS
        vector = begin + cuda.threadIdx.x
        offset = launch_table.item(record).before * itemsize + 16 * vector
        while vector + THREADS < end:
            step_two(table, (addresses, offset), width)
            vector += 2 * THREADS
            offset += 2 * width
        while vector < end:
            step_vector(table, (addresses, offset), width)
            vector += THREADS
            offset += width

    @intrinsics.inlined
    def element(table, record, number):  # type: ignore[no-untyped-def]
        step_element(table, (record, launch_table.header(table).width, number), 0)

    return loops.over_pieces(code, vectors, element)


THREADS = 256


@functools.cache
def _updater(rule: int, count: int) -> Any:
    """Return the device function that applies a rule to ``count`` vectors, or to an element."""

    @intrinsics.inlined
    def update(g, p, s, t, numbers):  # type: ignore[no-untyped-def]
        return optimizer_rules.apply(rule, g, p, s, t, numbers)

    if count < 2:
        return update
    update_rest = _updater(rule, count - 1)

    @intrinsics.inlined
    def update_all(g, p, s, t, numbers):  # type: ignore[no-untyped-def]
        a, b, c = update(g[0], p[0], s[0], t[0], numbers)
        d, e, f = update_rest(g[1], p[1], s[1], t[1], numbers)
        return (a, d), (b, e), (c, f)

    return update_all


def _stepper(rule: int, code: int, count: int, address: Any) -> Any:
    """Return the device function that updates ``count`` vectors, or an element, of all copies.

    ``g`` is the gradient, ``p`` the parameter, ``s`` and ``t`` are the slots.
    """
    num_slots = (0, 1, 1, 2)[rule]
    load_gradient = reducers.loader(arithmetic.ADD, code, count, address)
    load, _, divide, store = reducers.batch(arithmetic.ADD, code, count)
    update = _updater(rule, count)

    @intrinsics.inlined
    def step(table, place, width):  # type: ignore[no-untyped-def]
        header = launch_table.header(table)
        num_copies, parameter = header.num_targets, header.num_sources
        slot = parameter + num_copies
        second_slot = slot + num_copies
        # All loads come before the first use of one; only further gradients come later.
        p = load(address(place, parameter), width)
        s = load(address(place, slot), width) if num_slots > 0 else p
        t = load(address(place, second_slot), width) if num_slots > 1 else p
        g = load_gradient(place, header.num_sources, width)
        g = divide(g, header.divisor)
        p, s, t = update(g, p, s, t, table + 8 * header.numbers)
        for k in range(num_copies):
            store(address(place, parameter + k), p, width)
            if num_slots > 0:
                store(address(place, slot + k), s, width)
            if num_slots > 1:
                store(address(place, second_slot + k), t, width)

    return step
