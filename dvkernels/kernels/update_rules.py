"""Update rules, coefficients and checks of the fused optimizers, for both twins.

SGD: plain, with momentum, with Nesterov momentum. Adam: D. P. Kingma, J. Ba, ICLR 2015,
arXiv:1412.6980. AdamW (decoupled weight decay): I. Loshchilov, F. Hutter, ICLR 2019,
arXiv:1711.05101. Adagrad: J. Duchi, E. Hazan, Y. Singer, J. Mach. Learn. Res. 12 (2011).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import BufferMismatchError, UnsupportedDTypeError
from dvkernels.kernels import checks
from dvkernels.reduce_op import ReduceOp

__all__ = [
    "ADAGRAD",
    "ADAM",
    "MOMENTUM",
    "NESTEROV",
    "NUM_COEFFICIENTS",
    "NUM_SLOTS",
    "PLAIN",
    "CheckedStep",
    "adagrad_step",
    "adam_coefficients",
    "adam_step",
    "check",
    "sgd_coefficients",
    "sgd_rule",
    "sgd_step",
]

PLAIN, MOMENTUM, NESTEROV, ADAM, ADAGRAD = range(5)
NUM_SLOTS = (0, 1, 1, 2, 1)  # of each rule
NUM_COEFFICIENTS = 9  # of the rule with most

Groups = Sequence[Sequence[Any]]
Each = float | Sequence[float]  # one value for all parameters, or one for each
Coefficients = tuple[float, ...]
Rule = tuple[int, Sequence[Coefficients]]  # one of the rules above; each parameter's coefficients


# The arithmetic of a step. The numbers are of one type, and round after each operation: elements in
# code that Numba compiles, NumPy arrays, or vectors in the registers of a GPU.


def sgd_step(rule: int, gradient: Any, parameter: Any, velocity: Any, coefficients: Any) -> Any:
    """Return the new parameter and the new velocity, which a plain step has none of."""
    rate, momentum, decay = coefficients[0], coefficients[1], coefficients[2]
    slope = gradient + decay * parameter
    if rule == PLAIN:
        return parameter - rate * slope, velocity
    speed = momentum * velocity + slope
    direction = slope + momentum * speed if rule == NESTEROV else speed
    return parameter - rate * direction, speed


def adam_step(gradient: Any, parameter: Any, first: Any, second: Any, coefficients: Any) -> Any:
    """Return the new parameter, and its new first and second moments."""
    rate, beta_1, beta_2, epsilon, correction, decay, kept, new_1, new_2 = coefficients
    slope = gradient + decay * parameter
    mean = beta_1 * first + new_1 * slope
    square = beta_2 * second + new_2 * slope * slope
    denominator = np.sqrt(square) * correction + epsilon
    return kept * parameter - rate * mean / denominator, mean, square


def adagrad_step(gradient: Any, parameter: Any, squares: Any, coefficients: Any) -> Any:
    """Return the new parameter, and the new sum of squares."""
    rate, epsilon, decay = coefficients[0], coefficients[1], coefficients[2]
    slope = gradient + decay * parameter
    total = squares + slope * slope
    return parameter - rate * slope / (np.sqrt(total) + epsilon), total


def sgd_rule(has_velocities: bool, nesterov: bool) -> int:
    """Return the update rule of gradient descent: plain, with momentum, or with Nesterov's."""
    return PLAIN if not has_velocities else NESTEROV if nesterov else MOMENTUM


def sgd_coefficients(
    parameters: Groups, learning_rate: Each, momentum: float, weight_decay: float
) -> list[Coefficients]:
    """Return the coefficients of gradient descent for each parameter."""
    rates = _each("optimizers.sgd", "learning_rate", learning_rate, len(parameters))
    return [(float(rate), momentum, weight_decay) for rate in rates]


def adam_coefficients(
    parameters: Groups,
    step: Each,
    learning_rate: Each,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    decoupled: bool,
) -> list[Coefficients]:
    """Return the coefficients of Adam for each parameter; raise where a step is less than 1.

    The bias corrections of the two moments are in the first and the fifth coefficient.
    """

    @functools.cache
    def coefficients(count: int, rate: float) -> Coefficients:
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
            1 - beta_1,
            1 - beta_2,
        )

    counts = _each("optimizers.adam", "step", step, len(parameters))
    rates = _each("optimizers.adam", "learning_rate", learning_rate, len(parameters))
    return [*map(coefficients, counts, map(float, rates))]


def _each(verb: str, name: str, given: Each, count: int) -> list[Any]:
    """Return one value for each parameter; a single value is repeated."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise BufferMismatchError(
            f"{verb} needs one {name}, or one for each of the {count} parameters; got {len(given)}"
        )
    return [*given]


class CheckedStep(NamedTuple):
    """Checked arguments of an optimizer step, grouped by dtype and coefficients.

    Each list of arrays holds the gradients of a parameter, then the copies of each of its states.
    """

    op: ReduceOp
    groups: dict[tuple[np.dtype[Any], Coefficients], list[list[HostArray]]]
    num_replicas: int
    num_copies: int


def check(
    verb: str,
    gradients: Groups,
    states: Sequence[Groups],
    coefficients: Sequence[Coefficients],
    op: Any,
) -> CheckedStep | None:
    """Return the checked step, None without parameters; raise before any array is touched."""
    parameters, *slots = states
    lengths = {len(gradients), len(parameters), *map(len, slots)}
    if len(lengths) != 1:
        raise BufferMismatchError(
            f"{verb} needs as many gradients, parameters and slots; got "
            f"{[len(gradients), len(parameters), *map(len, slots)]}"
        )
    known: Any = None
    # Of each parameter: its gradients, its copies, the copies of its slots.
    found: list[list[list[HostArray]]] = []
    sizes: set[tuple[int, int]] = set()
    every_write: list[HostArray] = []
    every_read: list[HostArray] = []
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
        found.append([reads])
        for name, state in (("parameter", parameters), *(("slot", slot) for slot in slots)):
            copies = checks.arrays(f"{verb}, {name} {k}", state[k], "copy")
            found[-1].append(copies)
            if len(copies) != len(parameters[k]):
                raise BufferMismatchError(
                    f"{verb}, {name} {k}: expected {len(parameters[k])} copies, as of the "
                    f"parameter; got {len(copies)}"
                )
        writes = [copy for copies in found[-1][1:] for copy in copies]
        checks.check_shapes(f"{verb}, parameter {k}", reads[0], writes, len(writes))
        sizes.add((len(reads), len(parameters[k])))
        every_write += writes
        every_read += reads
    if not found:
        return None
    if len(sizes) != 1:
        raise BufferMismatchError(
            f"{verb} needs the same number of replicas, and of copies, for every parameter; got "
            f"{sorted(sizes)} as (replicas, copies)"
        )
    checks.check_overlaps(
        verb, every_write, every_read, "written array {}".format, may_be_inputs=False
    )
    columns = [*zip(*found, strict=True)]
    return grouped(columns[0], columns[1:], coefficients, known)


def grouped(
    gradients: Groups, states: Sequence[Groups], coefficients: Sequence[Coefficients], op: ReduceOp
) -> CheckedStep:
    """Return a step whose arrays have been checked; the parameters are the first of the states."""
    groups: dict[tuple[np.dtype[Any], Coefficients], list[list[HostArray]]] = {}
    for k, reads in enumerate(gradients):
        writes = [copy for state in states for copy in state[k]]
        groups.setdefault((reads[0].dtype, coefficients[k]), []).append([*reads, *writes])
    return CheckedStep(op, groups, len(gradients[0]), len(states[0][0]))
