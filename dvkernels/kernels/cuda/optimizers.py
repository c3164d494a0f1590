"""SGD, Adam and AdamW fused with the reduction of the gradients: one launch, one pass over memory.

For N replicas of S bytes and two moments: N S of gradients are read, 3 S of parameters and moments
are read from the first copies, and 3 S are written to each copy. Copies must be equal before the
call; they are equal after it. The update rules are in engine/optimizer_rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cuda.engine import catalogue, job
from dvkernels.kernels.cuda.engine.call import Call
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
            # Parameters and slots are read too.
            absent = update_rules.NUM_COEFFICIENTS - len(numbers_of_group)
            padded = [*numbers_of_group, *[0.0] * absent]
            kernel = catalogue.optimizer(number, code)
            job.run(work_stream, kernel, code, groups, counts, len(groups[0]), padded)
