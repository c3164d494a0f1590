"""What both twins of the fused optimizers share: their rules, their numbers and their checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import BufferMismatchError, UnsupportedDTypeError
from dvkernels.kernels import checks
from dvkernels.reduce_op import ReduceOp

__all__ = [
    "ADAM",
    "MOMENTUM",
    "NESTEROV",
    "PLAIN",
    "CheckedStep",
    "adam_numbers",
    "check",
    "sgd_numbers",
    "sgd_rule",
]

PLAIN, MOMENTUM, NESTEROV, ADAM = range(4)

Array = np.ndarray[Any, Any]
Groups = Sequence[Sequence[Any]]
Each = float | Sequence[float]  # one for all parameters, or one for each
Numbers = tuple[float, ...]


def sgd_rule(velocities: Any, nesterov: bool) -> int:
    """Return the rule of gradient descent with these."""
    return PLAIN if velocities is None else NESTEROV if nesterov else MOMENTUM


def sgd_numbers(
    parameters: Groups, learning_rate: Each, momentum: float, weight_decay: float
) -> list[Numbers]:
    """Return the numbers that the rules of gradient descent need, for each parameter."""
    rates = _each("optimizers.sgd", "learning_rate", learning_rate, len(parameters))
    return [(float(rate), momentum, weight_decay) for rate in rates]


def adam_numbers(
    parameters: Groups,
    step: Each,
    learning_rate: Each,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    decoupled: bool,
) -> list[Numbers]:
    """Return the numbers that the rule of Adam needs, for each parameter.

    Raise unless each step has a number.
    """

    @functools.cache
    def numbers(count: int, rate: float) -> Numbers:
        if count < 1:
            raise ValueError(f"optimizers.adam: steps are counted from 1; got {count}")
        return (
            rate / (1 - beta_1**count),
            beta_1,
            beta_2,
            epsilon,
            1 / math.sqrt(1 - beta_2**count),
            0.0 if decoupled else weight_decay,
            1 - rate * weight_decay if decoupled else 1.0,
        )

    counts = _each("optimizers.adam", "step", step, len(parameters))
    rates = _each("optimizers.adam", "learning_rate", learning_rate, len(parameters))
    return [*map(numbers, counts, map(float, rates))]


def _each(verb: str, name: str, given: Each, count: int) -> list[Any]:
    """Return one number for each parameter: the same, where one came for all."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise BufferMismatchError(
            f"{verb} needs one {name}, or one for each of the {count} parameters; got {len(given)}"
        )
    return [*given]


class CheckedStep(NamedTuple):
    """A step that has been checked: each group is the gradients, then the copies of each state.

    Groups of one dtype and of the same numbers go together.
    """

    op: ReduceOp
    groups: dict[tuple[np.dtype[Any], Numbers], list[list[Array]]]
    num_replicas: int
    num_copies: int


def check(
    verb: str,
    gradients: Groups,
    parameters: Groups,
    slots: Sequence[Groups],
    numbers: Sequence[Numbers],
    op: Any,
) -> CheckedStep | None:
    """Return the step on these arrays, None where there are none; raise before any is touched."""
    lengths = {len(gradients), len(parameters), *map(len, slots)}
    if len(lengths) != 1:
        raise BufferMismatchError(
            f"{verb} needs as many gradients, parameters and slots; got "
            f"{[len(gradients), len(parameters), *map(len, slots)]}"
        )
    known: Any = None
    groups: dict[tuple[np.dtype[Any], Numbers], list[list[Array]]] = {}
    sizes: set[tuple[int, int]] = set()
    every_write: list[Array] = []
    every_read: list[Array] = []
    for k, gradient in enumerate(gradients):
        where = f"{verb}, gradient {k}"
        reads = checks.arrays(where, gradient)
        dtype = reads[0].dtype
        known = checks.reduction(where, op, dtype)
        if known not in (ReduceOp.MEAN, ReduceOp.SUM) or dtype.char not in "fd":
            raise UnsupportedDTypeError(
                f"{where}: expected the mean or sum of float32 or float64, got the "
                f"{known.name} of {dtype}; cast to float32 first"
            )
        writes: list[Array] = []
        for name, states in (("parameter", parameters), *(("slot", slot) for slot in slots)):
            copies = checks.arrays(f"{verb}, {name} {k}", states[k], "copy")
            writes += copies
            if len(copies) != len(parameters[k]):
                raise BufferMismatchError(
                    f"{verb}, {name} {k}: expected {len(parameters[k])} copies, as of the "
                    f"parameter; got {len(copies)}"
                )
        checks.fitting(f"{verb}, parameter {k}", reads[0], writes, len(writes))
        groups.setdefault((dtype, numbers[k]), []).append([*reads, *writes])
        sizes.add((len(reads), len(parameters[k])))
        every_write += writes
        every_read += reads
    if not groups:
        return None
    if len(sizes) != 1:
        raise BufferMismatchError(
            f"{verb} needs the same number of replicas, and of copies, for every parameter; got "
            f"{sorted(sizes)} as (replicas, copies)"
        )
    checks.all_apart(verb, every_write, every_read, "written array {}".format)
    ((num_replicas, num_copies),) = sizes
    return CheckedStep(known, groups, num_replicas, num_copies)
