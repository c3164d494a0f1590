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
    is_checked: bool = False,
) -> None:
    """Reduce gradients and take a step of gradient descent, as ``kernels.cpu.optimizers.sgd`` does.

    There is no parameter ``shares``: scale the gradients before the call, and reduce with
    ``op="sum"``.

    ``stream`` is one stream, or None for the current streams; see :mod:`dvkernels.kernels.cuda`.
    """
    slots = [] if velocities is None else [velocities]
    numbers = update_rules.sgd_coefficients(parameters, learning_rate, momentum, weight_decay)
    rule = update_rules.sgd_rule(velocities, nesterov)
    _step("optimizers.sgd", rule, gradients, parameters, slots, numbers, op, stream, is_checked)


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
    is_checked: bool = False,
) -> None:
    """Reduce gradients and take a step of Adam or AdamW, as ``kernels.cpu.optimizers.adam`` does.

    ``stream`` is one stream, or None for the current streams; see :mod:`dvkernels.kernels.cuda`.
    """
    numbers = update_rules.adam_coefficients(
        parameters, step, learning_rate, beta_1, beta_2, epsilon, weight_decay, decoupled
    )
    slots = [first_moments, second_moments]
    _step(
        "optimizers.adam",
        update_rules.ADAM,
        gradients,
        parameters,
        slots,
        numbers,
        op,
        stream,
        is_checked,
    )


def _step(
    verb: str,
    rule: int,
    gradients: Groups,
    parameters: Groups,
    slots: Sequence[Groups],
    numbers: Sequence[update_rules.Coefficients],
    op: Any,
    stream: Any,
    is_checked: bool,
) -> None:
    call = Call(verb, stream)
    arrays = [
        [call.register(group, f"{verb}, {name} {k}", what) for k, group in enumerate(groups)]
        for groups, name, what in (
            (gradients, "gradient", "replica"),
            (parameters, "parameter", "copy"),
            *((slot, "slot", "copy") for slot in slots),
        )
    ]
    step: update_rules.CheckedStep | None
    if is_checked:
        step = update_rules.grouped(arrays[0], arrays[1:], numbers, op)
    else:
        step = update_rules.check(verb, arrays[0], arrays[1], arrays[2:], numbers, op)
    if step is None:
        return
    divisor = step.num_replicas if step.op is ReduceOp.MEAN else 1
    with call.ordered() as work_stream:
        for (dtype, numbers_of_group), groups in step.groups.items():
            counts = job.Counts(step.num_replicas, step.num_copies, step.num_replicas, divisor)
            code = arithmetic.type_code(dtype)
            # Parameters and slots are read too. Seven numbers: as many as the longest rule takes.
            padded = [*numbers_of_group, *[0.0] * (7 - len(numbers_of_group))]
            job.run(work_stream, kernel(rule, code), code, groups, counts, len(groups[0]), padded)


@functools.cache
def kernel(rule: int, code: int) -> Callable[..., None]:
    """Return the kernel of an update rule (update_rules) and an element type, not compiled.

    ``g`` and ``a`` are the gradient, ``p`` and ``x`` the parameter, ``s t`` and ``y z`` the slots:
    of a vector of 16 bytes, and of one element.
    """
    itemsize = arithmetic.dtype_of(code).itemsize
    per_vector = intrinsics.VECTOR_NBYTES // itemsize
    add = elements.combiner(arithmetic.ADD, code)
    header, record_size = launch_table.HEADER, launch_table.RECORD
    num_slots = (0, 1, 1, 2)[rule]

    def run(words):  # type: ignore[no-untyped-def]
        table = launch_table.stage(words)
        num_replicas, num_copies = launch_table.entry(table, 2), launch_table.entry(table, 3)
        divisor, per_thread = launch_table.entry(table, 5), launch_table.entry(table, 6)
        width, numbers = launch_table.entry(table, 7), table + 8 * launch_table.entry(table, 8)
        first_parameter = num_replicas
        first_slot = first_parameter + num_copies * (1 if num_slots > 0 else 0)
        second_slot = first_parameter + num_copies * num_slots
        threads, thread = cuda.blockDim.x, cuda.threadIdx.x
        for piece in range(cuda.blockIdx.x, launch_table.entry(table, 0), cuda.gridDim.x):
            item = launch_table.locate(table, piece)
            piece_of_item = piece - launch_table.entry(table, header + 2 * item)
            record = table + 8 * launch_table.entry(table, header + 2 * item + 1)
            num_axes, before = launch_table.entry(record, 0), launch_table.entry(record, 1)
            units, after = launch_table.entry(record, 2), launch_table.entry(record, 3)
            arrays = record + 8 * record_size
            begin = piece_of_item * per_thread * threads
            end = min(begin + per_thread * threads, units)
            if num_axes == 0:
                for vector in range(begin + thread, end, threads):
                    offset = before * itemsize + 16 * vector
                    g = elements.load(launch_table.entry(arrays, 0) + offset, code, True)
                    for k in range(1, num_replicas):
                        h = elements.load(launch_table.entry(arrays, k) + offset, code, True)
                        g = add(g, h)
                    g = elements.divide(g, divisor, code)
                    p = elements.load(
                        launch_table.entry(arrays, first_parameter) + offset, code, True
                    )
                    s = elements.load(launch_table.entry(arrays, first_slot) + offset, code, True)
                    t = elements.load(launch_table.entry(arrays, second_slot) + offset, code, True)
                    p, s, t = optimizer_rules.apply(rule, g, p, s, t, numbers)
                    for k in range(num_copies):
                        elements.store(
                            launch_table.entry(arrays, first_parameter + k) + offset, p, code, True
                        )
                        if num_slots > 0:
                            elements.store(
                                launch_table.entry(arrays, first_slot + k) + offset, s, code, True
                            )
                        if num_slots > 1:
                            elements.store(
                                launch_table.entry(arrays, second_slot + k) + offset, t, code, True
                            )
                # The first piece also takes the elements before and after the whole vectors.
                begin, end = 0, before + after if piece_of_item == 0 else 0
            for unit in range(begin + thread, end, threads):
                skipped = units * per_vector if num_axes == 0 and unit >= before else 0
                i = unit + skipped
                shift = launch_table.byte_offset(record, width, 0, i, itemsize)
                a = elements.load(launch_table.entry(arrays, 0) + shift, code, False)
                for k in range(1, num_replicas):
                    shift = launch_table.byte_offset(record, width, k, i, itemsize)
                    b = elements.load(launch_table.entry(arrays, k) + shift, code, False)
                    a = add(a, b)
                a = elements.divide(a, divisor, code)
                shift = launch_table.byte_offset(record, width, first_parameter, i, itemsize)
                x = elements.load(launch_table.entry(arrays, first_parameter) + shift, code, False)
                shift = launch_table.byte_offset(record, width, first_slot, i, itemsize)
                y = elements.load(launch_table.entry(arrays, first_slot) + shift, code, False)
                shift = launch_table.byte_offset(record, width, second_slot, i, itemsize)
                z = elements.load(launch_table.entry(arrays, second_slot) + shift, code, False)
                x, y, z = optimizer_rules.apply(rule, a, x, y, z, numbers)
                for k in range(num_copies):
                    shift = launch_table.byte_offset(
                        record, width, first_parameter + k, i, itemsize
                    )
                    elements.store(
                        launch_table.entry(arrays, first_parameter + k) + shift, x, code, False
                    )
                    if num_slots > 0:
                        shift = launch_table.byte_offset(record, width, first_slot + k, i, itemsize)
                        elements.store(
                            launch_table.entry(arrays, first_slot + k) + shift, y, code, False
                        )
                    if num_slots > 1:
                        shift = launch_table.byte_offset(
                            record, width, second_slot + k, i, itemsize
                        )
                        elements.store(
                            launch_table.entry(arrays, second_slot + k) + shift, z, code, False
                        )

    return run
