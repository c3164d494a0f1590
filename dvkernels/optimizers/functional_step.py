"""Optimizer steps on arrays that cannot be written: XLA compiles the update rules themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.jax import lowering, shard_map
from dvkernels.devices import array_memory, jax_arrays, jax_devices
from dvkernels.kernels import update_rules
from dvkernels.optimizers import gradients as gradient_checks
from dvkernels.optimizers.slots import VariableState
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import Copies
from dvkernels.variables.traced_state import GradientUse, TracedState
from dvkernels.variables.variable import Variable, storage_of

__all__: list[str] = []

States = Sequence[Sequence[Any]]  # of each variable: the parameter, then its slots


def new_contents(
    owner: Placement,
    rule: update_rules.Rule,
    columns: Sequence[Sequence[Any]],
    states: Sequence[Sequence[Copies]],
    op: Reduction,
) -> list[Any]:
    """Return the new contents of all states of all variables, by one compiled program.

    ``columns[k]`` holds the replicas' gradients of variable k, or one for all of them.
    """
    devices, mesh = owner.replica_devices, owner.mesh
    # Over several workers they have been reduced before.
    is_reduced = mesh.size == 1 or (len(columns[0]) > 1 and owner.workers.size == 1)
    program = _program(mesh, rule[0], op if is_reduced else None)
    own = [jax_devices.own(device) for device in devices]
    whole = []
    for column in columns:
        each = column if len(column) == len(devices) else [column[0]] * len(devices)
        whole.append(shard_map.assembled([*map(jax.device_put, each, own)], mesh))
    wholes: list[list[Any]] = [[copies.whole for copies in each] for each in states]  # type: ignore[attr-defined]
    made = shard_map.launch(functools.partial(program, whole, wholes, padded(rule[1])))
    return [content for each in made for content in each]


def padded(coefficients: Sequence[update_rules.Coefficients]) -> Any:
    """Return the coefficients of each variable as rows of one array, filled up with zeros."""
    rows = np.zeros((len(coefficients), update_rules.NUM_COEFFICIENTS))
    for row, given in zip(rows, coefficients, strict=True):
        row[: len(given)] = given
    return rows.astype(jnp.result_type(float))


@functools.lru_cache(maxsize=64)
def _program(mesh: Any, rule: int, op: Reduction | None) -> Any:
    def step(gradients: list[Any], states: list[list[Any]], coefficients: Any) -> list[list[Any]]:
        reduced = gradients if op is None else [lowering.all_reduce(each, op) for each in gradients]
        return _stepped(rule, reduced, states, coefficients)

    return jax.jit(lowering.spmd(step, mesh))


def _stepped(rule: int, gradients: Sequence[Any], states: States, rows: Any) -> list[list[Any]]:
    """Return the new states of each variable, given its reduced gradient and coefficients."""
    apply = array_memory.of_jax().apply
    return [
        apply(_new_states, gradient, rule, rows[k].astype(gradient.dtype), *states[k])
        for k, gradient in enumerate(gradients)
    ]


def _new_states(gradient: Any, rule: int, coefficients: Any, parameter: Any, *slots: Any) -> Any:
    numbers = [coefficients[k] for k in range(update_rules.NUM_COEFFICIENTS)]
    if rule == update_rules.ADAM:
        first, second = slots
        return [*update_rules.adam_step(gradient, parameter, first, second, numbers)]
    if rule == update_rules.ADAGRAD:
        return [*update_rules.adagrad_step(gradient, parameter, slots[0], numbers)]
    velocity = slots[0] if slots else None
    return [*update_rules.sgd_step(rule, gradient, parameter, velocity, numbers)][: 1 + len(slots)]


def take_traced_step(
    optimizer: Any,
    trace: TracedState,
    pairs: Sequence[gradient_checks.Pair],
    op: ReduceOp,
    weight: Any,
) -> None:
    """Take a step of an optimizer inside a program that JAX traces.

    Rates and bias corrections are computed before each call of the program, and passed to it.
    """
    present = [pair for pair in pairs if pair[0] is not None]
    variables = gradient_checks.variables_of(present, op)
    if weight is not None and op is not ReduceOp.MEAN:
        raise ValueError(f"apply_gradients: a weight belongs to MEAN, got op {op.name}")
    if not variables:
        return
    arrays = [
        gradient_checks.checked(trace.array(gradient), variable, 0, counts=False)
        for gradient, variable in present
    ]
    if weight is None:
        reduced = [lowering.all_reduce(array, op) for array in arrays]
    else:
        own = trace.weight(weight, gradient_checks.VERB, op)
        reduced = [lowering.weighted_mean(array, own) for array in arrays]
    names = optimizer.slot_names
    found = slots_of(optimizer, variables)
    states = states_of(variables, found, names)
    rule = _rule_of(optimizer, [0] * len(variables))[0]
    rows = trace.coefficients(len(variables))
    use = GradientUse(optimizer, rule, tuple(variables), optimizer._slots, names, found)
    trace.gradient_uses.append(use)
    values = [[trace.read(copies) for copies in each] for each in states]
    for each, new in zip(states, _stepped(rule, reduced, values, rows), strict=True):
        for copies, content in zip(each, new, strict=True):
            trace.store(copies, content)


def slots_of(optimizer: Any, variables: Sequence[Variable]) -> list[VariableState]:
    """Return slots and step counts of variables; those that do not exist yet are made."""
    with jax_devices.outside_traces():
        found: list[VariableState] = optimizer._slots.states_of(variables, optimizer.slot_names)
        return found


def states_of(
    variables: Sequence[Variable], found: Sequence[VariableState], names: Sequence[str]
) -> list[list[Copies]]:
    """Return the storage of each variable and of its slots."""
    return [
        [storage_of(variable), *(storage_of(state.slots[name]) for name in names)]
        for variable, state in zip(variables, found, strict=True)
    ]


def _rule_of(optimizer: Any, counts: Sequence[int]) -> update_rules.Rule:
    columns: Any = [[None]] * len(counts)
    rule: update_rules.Rule = optimizer._rule(columns, counts)
    return rule


class StepNumbers(NamedTuple):
    """Numbers of a step: a row of coefficients for each variable of each use of gradients.

    ``most`` has the largest step count after each use.
    """

    rows: list[update_rules.Coefficients]
    most: list[int]


def numbers_now(uses: Sequence[GradientUse]) -> StepNumbers | None:
    """Return the numbers of a step, for the step counts that all variables have now.

    None if an optimizer has other slots or another rule by now, so that the step must be compiled
    anew.
    """
    numbers = StepNumbers([], [])
    earlier: dict[int, int] = {}  # uses of a variable in the same step
    for optimizer, rule, variables, slots, names, states in uses:
        if optimizer._slots is not slots or optimizer.slot_names != names:
            return None
        counts = [int(state.steps) for state in states]
        if len(uses) > 1:
            for k, variable in enumerate(variables):
                before = earlier.get(id(variable), 0)
                counts[k] += before
                earlier[id(variable)] = before + 1
        different = [*dict.fromkeys(counts)]  # usually one
        now, coefficients = _rule_of(optimizer, different)
        if now != rule:
            return None
        row_of = dict(zip(different, coefficients, strict=True))
        numbers.rows.extend(map(row_of.__getitem__, counts))
        numbers.most.append(max(different) + 1)
    return numbers


def count_steps(uses: Sequence[GradientUse], most: Sequence[int]) -> None:
    """Count a step of each variable of each use."""
    for use, count in zip(uses, most, strict=True):
        use.optimizer.count_steps(use.states, count)


def clipped(gradients: Sequence[Any], limit: float) -> tuple[list[Any], Any]:
    """Return gradients of JAX, scaled so that their norm is at most ``limit``, and their norm.

    All of them are NaN if the norm is not finite. A traced norm stays an array.
    """
    wide = [array.astype(reduce_op.working_dtype(np.dtype(array.dtype))) for array in gradients]
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(array))) for array in wide))
    factor = jnp.where(norm <= limit, 1, limit / jnp.where(jnp.isfinite(norm), norm, jnp.nan))
    scaled = [
        (array * factor.astype(array.real.dtype)).astype(gradient.dtype)
        for array, gradient in zip(wide, gradients, strict=True)
    ]
    return scaled, norm if jax_arrays.is_traced(norm) else float(norm)
