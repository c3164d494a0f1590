"""Fused optimizers: reduction of the gradients and update of the parameters in one pass.

Separate passes move, for N replicas of S bytes and two moments, 2 N S for the all-reduce and then
7 N S for the update. Here each thread takes a block of elements at a time: it sums the gradients
into a block that stays in its cache, updates the first copy of the parameter and its moments, and
writes these to the other copies: N S of gradients read, 3 S of state read, 3 N S written.

All copies must be equal before the step; they are equal after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types

from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import arithmetic, jit, update_rules
from dvkernels.kernels.cpu.engine import intrinsics, loops
from dvkernels.kernels.cpu.engine import job as jobs
from dvkernels.reduce_op import ReduceOp

__all__ = ["adam", "runner", "sgd"]


carray: Any = vars(numba)["carray"]  # it is missing from Numba's stubs
Array = np.ndarray[Any, Any]
Groups = Sequence[Sequence[Any]]

# Elements of a block. Its gradient, parameter and two moments are 128 KiB of float32, in L2.
# Four replicas of 64 MiB, mean and Adam: 50 ms with blocks of 256, 35 of 1 024, 31 of 4 096, 29 of
# 8 192 (2 cores of an AMD EPYC, 2026-11). Prefetching the states while the gradients are summed
# gave a tenth of that.
_BLOCK = 8192
_NUM_COEFFICIENTS = 8  # room for those of any rule; the replicas' shares follow them


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
    shares: Sequence[float] | None = None,
    is_checked: bool = False,
) -> None:
    """Reduce gradients and take a step of gradient descent, in one pass.

    Parameters
    ----------
    gradients : sequence of sequence of array, float32 or float64
        ``gradients[k]`` holds the N replicas' gradients of parameter k, of one shape and dtype.
        Not changed.
    parameters : sequence of sequence of array
        ``parameters[k]`` holds the equal copies of parameter k, any number of them, of the
        gradients' shape and dtype. Overwritten.
    velocities : sequence of sequence of array, optional
        As many copies of each velocity as of its parameter, zeros before the first step.
        Overwritten. Needed with momentum.
    learning_rate, momentum, weight_decay : float
        With ``g`` the reduced gradient plus ``weight_decay`` times the parameter:
        ``v = momentum v + g`` and ``p = p - learning_rate v``; with ``nesterov``
        ``p = p - learning_rate (g + momentum v)``. The learning rate may be a list: one for each
        parameter.
    nesterov : bool
        Whether to use Nesterov's momentum.
    op : ReduceOp or str
        ``"mean"`` or ``"sum"`` of the gradients.
    shares : sequence of float, optional
        Weights of the replicas: with ``"sum"``, the sum of share x gradient. A gradient with a
        share of 0 is not read.
    is_checked : bool
        The caller has checked all arrays, and that no written one shares an element with another.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError
        As in :func:`dvkernels.kernels.all_reduce`, or the numbers of arrays or copies differ. No
        array has been touched.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels.kernels.cpu import optimizers
    >>> weight = [np.array([1.0, 2.0])]
    >>> optimizers.sgd([[np.array([1.0, 0.0]), np.array([3.0, 2.0])]], [weight], learning_rate=0.1)
    >>> weight[0]
    array([0.8, 1.9])
    """
    slots = [] if velocities is None else [velocities]
    rule = update_rules.sgd_rule(velocities, nesterov)
    coefficients = update_rules.sgd_coefficients(parameters, learning_rate, momentum, weight_decay)
    _step(
        "optimizers.sgd", rule, gradients, parameters, slots, coefficients, op, shares, is_checked
    )


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
    shares: Sequence[float] | None = None,
    is_checked: bool = False,
) -> None:
    """Reduce gradients and take a step of Adam [1]_ or AdamW [2]_, in one pass.

    Parameters
    ----------
    gradients, parameters, op, shares, is_checked
        As in :func:`sgd`.
    first_moments, second_moments : sequence of sequence of array
        As many copies of each moment as of its parameter, zeros before the first step.
        Overwritten.
    step : int, or list of int
        The number of this step, from 1; or that of each parameter.
    learning_rate, beta_1, beta_2, epsilon : float
        As in the paper. The learning rate may be a list: one for each parameter.
    weight_decay : float
        Its product with the parameter is added to the gradient (Adam), or, if ``decoupled``,
        multiplied by the learning rate and subtracted from the parameter (AdamW).
    decoupled : bool
        Whether to take a step of AdamW.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError
        As in :func:`sgd`.

    References
    ----------
    .. [1] D. P. Kingma, J. Ba, ICLR 2015, doi:10.48550/arXiv.1412.6980.
    .. [2] I. Loshchilov, F. Hutter, ICLR 2019, doi:10.48550/arXiv.1711.05101.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels.kernels.cpu import optimizers
    >>> weight, first, second = ([np.zeros(2)] for _ in range(3))
    >>> gradients = [np.array([1.0, -1.0]), np.array([3.0, -3.0])]
    >>> optimizers.adam([gradients], [weight], [first], [second], step=1, learning_rate=0.5)
    >>> weight[0].round(6)
    array([-0.5,  0.5])
    """
    coefficients = update_rules.adam_coefficients(
        parameters, step, learning_rate, beta_1, beta_2, epsilon, weight_decay, decoupled
    )
    slots = [first_moments, second_moments]
    _step(
        "optimizers.adam",
        update_rules.ADAM,
        gradients,
        parameters,
        slots,
        coefficients,
        op,
        shares,
        is_checked,
    )


def _step(
    verb: str,
    rule: int,
    gradients: Groups,
    parameters: Groups,
    slots: Sequence[Groups],
    coefficients: Sequence[update_rules.Coefficients],
    op: Any,
    shares: Sequence[float] | None,
    is_checked: bool,
) -> None:
    step: update_rules.CheckedStep | None
    if is_checked:
        step = update_rules.grouped(gradients, [parameters, *slots], coefficients, op)
    else:
        step = update_rules.check(verb, gradients, parameters, slots, coefficients, op)
    if step is None:
        return
    num_replicas, num_copies = step.num_replicas, step.num_copies
    divisor = jobs.divisor(step.op, num_replicas)
    if shares is not None:
        if len(shares) != num_replicas or step.op is not ReduceOp.SUM:
            raise BufferMismatchError(
                f"{verb} needs a share for each of {num_replicas} replicas, and op 'sum'; got "
                f"{len(shares)} and {step.op.value!r}"
            )
        divisor = 0  # the runner's mark of a weighted sum
    program = _program(num_replicas, num_copies, 1 + len(slots), divisor)
    for (dtype, values), arrays in step.groups.items():
        constants = [*values, *[0.0] * (_NUM_COEFFICIENTS - len(values)), *(shares or ())]
        jobs.run(step.op, dtype, arrays, program, runner=runner(rule, dtype), constants=constants)


def _program(num_replicas: int, num_copies: int, num_states: int, divisor: int) -> jobs.Program:
    """Return a program of one row: sum the gradients into a block, the next entry of the table."""
    row = (-1, 0, num_replicas, num_replicas, num_copies, divisor)
    num_arrays = num_replicas + num_copies * num_states
    table = (*range(num_replicas), 0, *range(num_replicas, num_arrays))
    return jobs.Program((row,), table, num_arrays, num_replicas)


_runners: dict[tuple[int, np.dtype[Any]], Any] = {}


def runner(rule: int, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of a rule over float32 or float64, compiled if need be."""
    found = _runners.get((rule, dtype))
    if found is None:
        code = arithmetic.type_code(dtype)
        found = _runners[rule, dtype] = _make(rule, code, dtype.itemsize, dtype.type)
    address: int = found.address
    return address


def _make(rule: int, code: int, itemsize: int, real: Any) -> Any:
    """Compile the runner of a rule over ``real``, which is float32 or float64."""
    num_slots = (0, 1, 1, 2)[rule]

    @jit.cfunc(types.void(types.int64), error_model="numpy")
    def run(job):  # type: ignore[no-untyped-def]
        in_memory, width = intrinsics.load(job, 15), intrinsics.load(job, 16)
        row = job + 8 * intrinsics.load(job, 13)
        num_replicas, num_copies = intrinsics.load(row, 2), intrinsics.load(row, 4)
        divisor = intrinsics.load(row, 5)
        address = job + 8 * intrinsics.load(job, 19)
        coefficients = carray(intrinsics.pointer(address), _NUM_COEFFICIENTS, np.float64)
        shares = carray(
            intrinsics.pointer(address + 8 * _NUM_COEFFICIENTS), num_replicas, np.float64
        )
        scratch = np.empty(width, np.int64)
        table = np.int64(scratch.ctypes.data)
        block = np.empty(_BLOCK + 16, real)
        ordinal = intrinsics.fetch_add(job, 0, 1)
        attempt, begin, end = loops.claim(job, ordinal, 0)
        while begin < end:
            for piece in range(begin, end):
                lines, first, length, line, last_line = loops.locate(job, piece)
                while line < last_line:
                    loops.addresses_on(line, lines, width, table)
                    for offset in range(first, first + length, _BLOCK):
                        count = min(_BLOCK, first + length - offset)
                        shift = offset * itemsize
                        # The block is aligned in its cache lines as the gradients are in theirs.
                        start = np.int64(block.ctypes.data)
                        start += (intrinsics.load(table, 0) + shift - start) & 63
                        intrinsics.store(table, num_replicas, start - shift)
                        own = num_replicas + 1
                        if in_memory:
                            for state in range(num_slots + 1):
                                ahead = intrinsics.load(table, own + state * num_copies) + shift
                                for k in range(0, _BLOCK * itemsize, 64):
                                    intrinsics.prefetch(ahead + k)
                        gradient = carray(intrinsics.pointer(start), count, real)
                        if divisor > 0:
                            loops.span(
                                table, 0, num_replicas, num_replicas, 1, divisor, offset, count,
                                in_memory, 0, code,
                            )  # fmt: skip
                        else:
                            gradient[:] = 0
                            for k in range(num_replicas):
                                if shares[k] > 0:
                                    contribution = intrinsics.pointer(
                                        intrinsics.load(table, k) + shift
                                    )
                                    _add_share(
                                        gradient, carray(contribution, count, real), shares[k]
                                    )
                        parameter = carray(
                            intrinsics.pointer(intrinsics.load(table, own) + shift), count, real
                        )
                        second = own + num_copies if num_slots > 0 else own
                        third = second + num_copies if num_slots > 1 else second
                        slot = carray(
                            intrinsics.pointer(intrinsics.load(table, second) + shift), count, real
                        )
                        other = carray(
                            intrinsics.pointer(intrinsics.load(table, third) + shift), count, real
                        )
                        if rule == 3:
                            _adam(gradient, parameter, slot, other, coefficients)
                        else:
                            _sgd(rule, gradient, parameter, slot, coefficients)
                        if num_copies > 1:
                            for state in range(num_slots + 1):
                                source = own + state * num_copies
                                loops.span(
                                    table, source, 1, source + 1, num_copies - 1, 1, offset, count,
                                    2 * in_memory, 0, code,
                                )  # fmt: skip
                    line += 1
            attempt, begin, end = loops.claim(job, ordinal, attempt)

    return run


@jit.njit(nogil=True, error_model="numpy")
def _add_share(total, gradient, share):  # type: ignore[no-untyped-def]
    factor = gradient.dtype.type(share)
    for i in range(len(gradient)):
        total[i] += factor * gradient[i]


@jit.njit(nogil=True, error_model="numpy")
def _sgd(rule, gradient, parameter, velocity, coefficients):  # type: ignore[no-untyped-def]
    rate, momentum, decay = (
        gradient.dtype.type(coefficients[0]),
        gradient.dtype.type(coefficients[1]),
        gradient.dtype.type(coefficients[2]),
    )
    for i in range(len(gradient)):
        slope = gradient[i] + decay * parameter[i]
        if rule == 0:
            parameter[i] -= rate * slope
        else:
            speed = momentum * velocity[i] + slope
            velocity[i] = speed
            parameter[i] -= rate * (slope + momentum * speed if rule == 2 else speed)


@jit.njit(nogil=True, error_model="numpy")
def _adam(gradient, parameter, first, second, coefficients):  # type: ignore[no-untyped-def]
    real = gradient.dtype.type
    rate, beta_1, beta_2, epsilon = (
        real(coefficients[0]),
        real(coefficients[1]),
        real(coefficients[2]),
        real(coefficients[3]),
    )
    new_1, new_2 = real(1 - coefficients[1]), real(1 - coefficients[2])
    correction, decay, kept = real(coefficients[4]), real(coefficients[5]), real(coefficients[6])
    for i in range(len(gradient)):
        slope = gradient[i] + decay * parameter[i]
        mean = beta_1 * first[i] + new_1 * slope
        square = beta_2 * second[i] + new_2 * slope * slope
        first[i] = mean
        second[i] = square
        parameter[i] = kept * parameter[i] - rate * mean / (np.sqrt(square) * correction + epsilon)
