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

from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import update_rules
from dvkernels.kernels.cpu.engine import grouped_job, optimizer_rules, thread_pool
from dvkernels.kernels.cpu.engine import job as jobs
from dvkernels.kernels.cpu.engine.job_layout import Row
from dvkernels.reduce_op import ReduceOp

__all__ = ["adam", "sgd"]


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
    shares: Sequence[float] | None = None,
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
    states = [parameters] if velocities is None else [parameters, velocities]
    rule = update_rules.sgd_rule(velocities is not None, nesterov)
    coefficients = update_rules.sgd_coefficients(parameters, learning_rate, momentum, weight_decay)
    take_step("optimizers.sgd", (rule, coefficients), gradients, states, op, shares)


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
) -> None:
    """Reduce gradients and take a step of Adam [1]_ or AdamW [2]_, in one pass.

    Parameters
    ----------
    gradients, parameters, op, shares
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
    states = [parameters, first_moments, second_moments]
    take_step("optimizers.adam", (update_rules.ADAM, coefficients), gradients, states, op, shares)


def take_step(
    verb: str,
    rule: update_rules.Rule,
    gradients: Groups,
    states: Sequence[Groups],
    op: Any,
    shares: Sequence[float] | None = None,
    *,
    is_checked: bool = False,
) -> None:
    """Take a step of any rule; ``states`` are the parameters and the slots of the rule.

    ``is_checked``: the caller has checked all arrays, and that no written one shares an element
    with another.
    """
    number, coefficients = rule
    checked: update_rules.CheckedStep | None
    if is_checked:
        checked = update_rules.grouped(gradients, states, coefficients, op)
    else:
        checked = update_rules.check(verb, gradients, states, coefficients, op)
    if checked is None:
        return
    num_replicas, num_copies = checked.num_replicas, checked.num_copies
    divisor = jobs.divisor(checked.op, num_replicas)
    if shares is not None:
        if len(shares) != num_replicas or checked.op is not ReduceOp.SUM:
            raise BufferMismatchError(
                f"{verb} needs a share for each of {num_replicas} replicas, and op 'sum'; got "
                f"{len(shares)} and {checked.op.value!r}"
            )
        divisor = optimizer_rules.WEIGHTED
    # The gradients are summed into a block, whose entry of the table follows those of the arrays.
    row = Row(-1, 0, num_replicas, num_replicas, num_copies, divisor)
    num_arrays = num_replicas + num_copies * len(states)
    program = jobs.Program((row,), (*range(num_arrays), 0), num_arrays, num_replicas)
    for (dtype, values), arrays in checked.groups.items():
        found = optimizer_rules.recipe_of(number, dtype)
        constants = optimizer_rules.constants(values, shares or ())
        job = grouped_job.fill(arrays, found, row, num_arrays + 1, constants) if found else None
        if job is not None:
            thread_pool.execute(*job)
        else:
            runner = optimizer_rules.runner(number, dtype)
            jobs.run(checked.op, dtype, arrays, program, runner=runner, constants=constants)
