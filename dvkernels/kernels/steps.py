"""What both twins of the fused optimizers share: their rules, their numbers and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import BufferMismatchError, UnsupportedDTypeError
from dvkernels.kernels import checks
from dvkernels.reduce_op import ReduceOp

__all__ = ["ADAM", "MOMENTUM", "NESTEROV", "PLAIN", "Step", "adam_numbers", "check", "sgd_rule"]

PLAIN, MOMENTUM, NESTEROV, ADAM = range(4)

Array = np.ndarray[Any, Any]
Groups = Sequence[Sequence[Any]]


def sgd_rule(velocities: Any, nesterov: bool) -> int:
    """Return the rule of gradient descent with these."""
    return PLAIN if velocities is None else NESTEROV if nesterov else MOMENTUM


def adam_numbers(
    step: int,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[float, ...]:
    """Return the numbers that the rule of Adam needs; raise unless the step has a number."""
    if step < 1:
        raise ValueError(f"optimizers.adam: steps are counted from 1; got {step}")
    return (
        learning_rate / (1 - beta_1**step),
        beta_1,
        beta_2,
        epsilon,
        1 / math.sqrt(1 - beta_2**step),
        0.0 if decoupled else weight_decay,
        1 - learning_rate * weight_decay if decoupled else 1.0,
    )


class Step(NamedTuple):
    """A step that has been checked: each group is the gradients, then the copies of each state."""

    op: ReduceOp
    groups: dict[np.dtype[Any], list[list[Array]]]
    num_replicas: int
    num_copies: int


def check(
    verb: str, gradients: Groups, parameters: Groups, slots: Sequence[Groups], op: Any
) -> Step | None:
    """Return the step on these arrays, None where there are none; raise before any is touched."""
    lengths = {len(gradients), len(parameters), *map(len, slots)}
    if len(lengths) != 1:
        raise BufferMismatchError(
            f"{verb} needs as many gradients, parameters and slots; got "
            f"{[len(gradients), len(parameters), *map(len, slots)]}"
        )
    known: Any = None
    groups: dict[np.dtype[Any], list[list[Array]]] = {}
    sizes: set[tuple[int, int]] = set()
    every_write: list[Array] = []
    every_read: list[Array] = []
    for k, gradient in enumerate(gradients):
        where = f"{verb}, gradient {k}"
        reads = checks.arrays(where, gradient)
        dtype = reads[0].dtype
        known = checks.reduction(where, op, dtype)
        if known not in (ReduceOp.MEAN, ReduceOp.SUM) or dtype.name not in ("float32", "float64"):
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
        groups.setdefault(dtype, []).append([*reads, *writes])
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
    return Step(known, groups, num_replicas, num_copies)
