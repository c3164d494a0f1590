"""Traced state: the values of variables inside a program that JAX traces, and their modes.

What the table of ``synchronization.py`` does to copies is done here to the traced values of one
replica, with the collectives of XLA. A value is out of range or of weight 0 only when the program
runs, and then nothing can raise: updates of rows out of range are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dvkernels import reduce_op
from dvkernels.communicators.jax import lowering
from dvkernels.devices import jax_arrays
from dvkernels.devices.array_spec import Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, ContextError, NotABufferError
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.values import replica_weights
from dvkernels.variables import scatter
from dvkernels.variables.access import check_aggregation
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization

__all__: list[str] = []

_SUM, _MEAN = VariableAggregation.SUM, VariableAggregation.MEAN
_WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "assign": lambda _, value: value,
    "assign_add": jnp.add,
    "assign_sub": jnp.subtract,
}


class GradientUse(NamedTuple):
    """A call of ``apply_gradients`` in a trace, and what must still hold when the program runs."""

    optimizer: Any
    rule: int
    variables: Sequence[Any]
    slots: Any  # the optimizer's mapping of all slots
    names: Sequence[str]
    states: Sequence[Any]  # slots and step count of each variable


class TracedState:
    """Values of the variables of a strategy inside one trace.

    Attributes
    ----------
    used : dict of int to Copies
        By id, the variables that the program has read or written, in their order.
    written : dict of int to Copies
        Those that it has written.
    gradient_uses : list of GradientUse
        The calls of ``apply_gradients``.
    uses_step : bool
        Whether the program depends on the number of the step.
    """

    def __init__(
        self, values: dict[int, Any] | None, coefficients: Any, step: Any, zero: Any
    ) -> None:
        self._is_abstract = values is None
        self._values: dict[int, Any] = {} if values is None else values
        self._coefficients = coefficients
        self._step = step
        self._zero = zero
        self.used: dict[int, Any] = {}
        self.written: dict[int, Any] = {}
        self.gradient_uses: list[GradientUse] = []
        self.uses_step = False

    def read(self, copies: Copies) -> Any:
        """Return the value of a variable in this replica."""
        key = id(copies)
        if key not in self._values:
            if not self._is_abstract:
                raise ContextError(
                    f"variable {copies.name!r} was not used when this step was first evaluated; "
                    f"a compiled step must use the same variables each time it is traced"
                )
            like = copies.arrays[0]
            self._values[key] = jnp.broadcast_to(self._zero.astype(like.dtype), like.shape)
        self.used[key] = copies
        return self._values[key]

    def store(self, copies: Copies, value: Any) -> None:
        """Let a variable have a value in this replica."""
        if jax_arrays.is_traced(value) and not jax_arrays.are_of_one_trace(value, self._step):
            raise ContextError(
                f"variable {copies.name!r} was written inside a function that JAX traces by itself "
                f"(jax.jit, grad, cond, scan): the value would not leave it; return the value "
                f"from that function, and assign it outside"
            )
        self.used[id(copies)] = self.written[id(copies)] = copies
        self._values[id(copies)] = value

    def value_of(self, copies: Copies) -> Any:
        """Return the value of a used variable."""
        return self._values[id(copies)]

    def step(self) -> Any:
        """Return the number of the step, a traced uint32."""
        self.uses_step = True
        return self._step

    def coefficients(self, count: int) -> Any:
        """Return the coefficients of the next use of gradients: a row for each of its variables."""
        begin = sum(len(each.variables) for each in self.gradient_uses)
        if self._is_abstract:
            dtype = jnp.result_type(float)
            return jnp.broadcast_to(self._zero.astype(dtype), (count, 9))
        return self._coefficients[begin : begin + count]

    @staticmethod
    def array(value: Any) -> Any:
        """Return a value as a traced array."""
        is_traced = jax_arrays.is_traced(value)
        return value if is_traced else lax.optimization_barrier(jax_arrays.unshared_array(value))

    @staticmethod
    def weight(value: Any, verb: str, op: Reduction) -> Any:
        """Return the weight of a replica, one number; a value that is not traced is checked."""
        if not jax_arrays.is_traced(value):
            return replica_weights.checked(value, verb, op)
        if value.size != 1:
            raise ValueError(
                f"{verb}: a weight is a finite number of at least 0, got an array of "
                f"{spec(value)}; sum the weights of the rows"
            )
        return value.reshape(())

    # -- writes -----------------------------------------------------------------------------------

    def write(self, copies: Copies, verb: str, value: Any) -> None:
        """Write a variable, by its modes in replica context."""
        is_own = copies.synchronization is not VariableSynchronization.ON_WRITE
        if not is_own:
            check_aggregation(copies, verb)
        new = self._checked(copies, verb, value)
        if not is_own:
            new = _aggregated(copies, new)
        current = new if verb == "assign" else self.read(copies)
        self.store(copies, _WRITES[verb](current, new).astype(copies.arrays[0].dtype))

    def sync(self, copies: Copies, op: Reduction) -> None:
        """Let every copy of a NONE variable be the reduction of all."""
        self.store(copies, lowering.all_reduce(self.read(copies), op))

    def _checked(self, copies: Copies, verb: str, value: Any) -> Any:
        array = copies.converted(value, verb, None)
        expected = spec(copies.arrays[0])
        if spec(array) != expected:
            raise BufferMismatchError(
                f"{verb} of variable {copies.name!r} expected {expected}, got {spec(array)}; cast "
                f"with .astype or reshape it first"
            )
        return self.array(array)

    # -- rows -------------------------------------------------------------------------------------

    def gather_rows(self, copies: Copies, indices: Any, out: Any) -> Any:
        """Return rows of a variable; rows out of range give NaN, or the largest integer."""
        if out is not None:
            raise BufferMismatchError(
                f"gather_rows of variable {copies.name!r}: a compiled step writes no arrays; take "
                f"the result, without out"
            )
        rows = _row_numbers(copies, "gather_rows", indices)
        return jnp.take(self.read(copies), rows, axis=0, mode="fill")

    def scatter(self, copies: Copies, verb: str, indices: Any, updates: Any) -> None:
        """Apply updates of rows, by the modes of a variable in replica context."""
        when, how = copies.synchronization, copies.aggregation
        if when is VariableSynchronization.ON_READ:
            scatter.refuse_to_scatter(copies, verb)
        rows, content = self._checked_updates(copies, verb, indices, updates)
        if when is VariableSynchronization.ON_WRITE:
            check_aggregation(copies, verb)
            scatter.check_additive(copies, verb)
            if how in (_SUM, _MEAN):
                rows, content = lowering.all_gather(rows, 0), lowering.all_gather(content, 0)
            elif copies.placement.num_replicas > 1:
                rows, content = lowering.broadcast(rows, 0), lowering.broadcast(content, 0)
        dtype = copies.arrays[0].dtype
        wide = reduce_op.working_dtype(np.dtype(dtype))
        content = content.astype(wide)
        if how is _MEAN and when is VariableSynchronization.ON_WRITE:
            content = content / jnp.asarray(copies.placement.num_replicas, content.real.dtype)
        current = self.read(copies).astype(wide)
        self.store(copies, _scattered(current, verb, rows, content).astype(dtype))

    def _checked_updates(
        self, copies: Copies, verb: str, indices: Any, updates: Any
    ) -> tuple[Any, Any]:
        shape, dtype = copies.arrays[0].shape, copies.arrays[0].dtype
        rows = _row_numbers(copies, verb, indices)
        array = copies.converted(updates, verb, None)
        expected = Spec((*rows.shape, *shape[1:]), dtype)
        if array.ndim == 0 and isinstance(updates, (bool, int, float, complex)):
            array = jnp.broadcast_to(jnp.asarray(array), expected.shape)
        if spec(array) != expected:
            raise BufferMismatchError(
                f"{verb} of variable {copies.name!r} at indices of shape {rows.shape} expected "
                f"{expected}, or a number, got {spec(array)}"
            )
        return self.array(rows.reshape(-1)), self.array(array).reshape(-1, *shape[1:])


def _row_numbers(copies: Copies, verb: str, indices: Any) -> Any:
    refuse_masked(indices, f"{verb} of variable {copies.name!r}: the indices")
    rows = jax_arrays.unshared_array(indices)
    if copies.arrays[0].ndim == 0:
        raise BufferMismatchError(
            f"{verb} of variable {copies.name!r}: a 0-d variable has no rows; use the whole value"
        )
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise NotABufferError(
            f"{verb} of variable {copies.name!r}: expected integers as indices, got {spec(rows)}"
        )
    # Small types cannot count the rows. None is negative, which JAX would take from the end.
    rows = rows.astype(np.int64 if rows.dtype.itemsize == 8 else np.int32)
    return jnp.where(rows < 0, copies.arrays[0].shape[0], rows)


def _aggregated(copies: Copies, value: Any) -> Any:
    if copies.placement.num_replicas == 1:
        return value
    if copies.aggregation is _SUM:
        return lowering.all_reduce(value, ReduceOp.SUM)
    if copies.aggregation is _MEAN:
        return lowering.all_reduce(value, ReduceOp.MEAN)
    return lowering.broadcast(value, 0)


def _scattered(array: Any, verb: str, rows: Any, updates: Any) -> Any:
    """Return an array with updated rows, as if the updates came one after another."""
    at = array.at[rows]
    match verb:
        case "scatter_add":
            return at.add(updates, mode="drop")
        case "scatter_sub":
            return at.add(-updates, mode="drop")
        case "scatter_min":
            return at.min(updates, mode="drop")
        case "scatter_max":
            return at.max(updates, mode="drop")
        case "scatter_mul":
            return at.multiply(updates, mode="drop")
        case "scatter_update":
            # XLA does not say which update of a row it keeps: leave only the last of them.
            number = jnp.arange(rows.shape[0], dtype=jnp.int32)
            last = jnp.full(array.shape[0] + 1, -1, jnp.int32).at[rows].max(number, mode="drop")
            kept = jnp.where(last[jnp.minimum(rows, array.shape[0])] == number, rows, len(array))
            return array.at[kept].set(updates, mode="drop")
    is_integer = jnp.issubdtype(array.dtype, jnp.integer)
    divide = jnp.floor_divide if is_integer else jnp.divide

    def apply(k: Any, content: Any) -> Any:
        row = rows[k]
        return content.at[row].set(divide(content[row], updates[k]), mode="drop")

    return jax.lax.fori_loop(0, rows.shape[0], apply, array)
