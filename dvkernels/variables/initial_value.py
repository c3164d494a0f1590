"""Initial value of a variable: its conversion to an array of numbers, and the first copies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.devices import interop
from dvkernels.devices.array_spec import Spec, refuse_masked
from dvkernels.errors import (
    BufferMismatchError,
    NotABufferError,
    SynchronizationError,
    UnsupportedDTypeError,
)
from dvkernels.user_errors import brief, text_of
from dvkernels.values import function_checks
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import Copies
from dvkernels.variables.immutable_copies import ImmutableCopies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.reads import read

__all__: list[str] = []

_numbers = itertools.count()


def initial_copies(
    initial: Any,
    dtype: Any,
    when: VariableSynchronization,
    how: VariableAggregation,
    name: str | None,
    placement: Placement,
) -> Copies:
    """Return the copies of a new variable; raise where value, dtype, modes or placement clash."""
    label = f"variable_{next(_numbers)}" if name is None else name
    if callable(initial):
        function_checks.check(f"variable {label!r}: initial_value", initial)
    content = initial() if callable(initial) else initial
    value = read(content)
    refuse_masked(value, f"variable {label!r}: the initial value")
    if interop.is_foreign(value):
        value = placement.memory.view(f"variable {label!r}", value, "the initial value")
    try:
        is_on_device = interop.is_on_gpu(value) or interop.is_of_jax(value)
        array = value if is_on_device else np.asarray(value)
        wanted = array.dtype if dtype is None else np.dtype(dtype)
        kept = placement.memory.kept_dtype(wanted)
    except (TypeError, ValueError) as error:
        raise NotABufferError(
            f"variable {label!r}: the initial value {brief(content, 60)} is not an array: "
            f"{text_of(error)}"
        ) from error
    if kept != wanted:
        if dtype is not None or hasattr(value, "dtype"):
            raise UnsupportedDTypeError(
                f"variable {label!r}: expected numbers of at most 32 bits, got {wanted}: JAX has "
                f"none of 64 bits unless jax_enable_x64 is set, by jax.config.update("
                f"'jax_enable_x64', True) or JAX_ENABLE_X64=1; set it, or pass dtype='{kept}'"
            )
        wanted = kept
    if reduce_op.kind(array.dtype) in "biufc" and not (array.dtype == wanted and wanted.isnative):
        array = _cast(array, wanted, label)
    if reduce_op.kind(array.dtype) not in "biufc":
        raise NotABufferError(
            f"variable {label!r}: expected numbers, the initial value is of dtype {array.dtype}"
        )
    if how is VariableAggregation.MEAN and array.dtype.kind in "biu":
        raise SynchronizationError(
            f"variable {label!r}: the mean of {array.dtype} values is not a {array.dtype}; use "
            f"aggregation 'sum' or 'only_first_replica', or a floating-point dtype"
        )
    if placement.central_device is not None and when is not VariableSynchronization.ON_WRITE:
        raise SynchronizationError(
            f"variable {label!r}: synchronization={when.value!r} needs one copy per replica, and "
            f"{placement.name} keeps a single one on {placement.central_device}; use 'on_write'"
        )
    array = placement.broadcast_from_chief(array)
    if placement.make_copies is not None:
        made: Copies = placement.make_copies(array, placement, label, when, how)
        return made
    kind = ImmutableCopies if placement.memory.is_immutable else Copies
    return kind([array], placement, label, when, how)


def _cast(array: Any, dtype: np.dtype[Any], label: str) -> Any:
    """Cast an array; raise if an integer would change, or the imaginary part be dropped."""
    into = reduce_op.kind(dtype)
    if into not in "biufc":
        raise NotABufferError(f"variable {label!r}: expected a dtype of numbers, got {dtype}")
    if not dtype.isnative:  # kernels compute in native byte order only
        dtype = dtype.newbyteorder("=")
    is_kept = reduce_op.kind(array.dtype) != "c" or into == "c"
    cast = None
    if is_kept:
        with np.errstate(invalid="ignore"):  # the comparison below finds a NaN cast to an integer
            cast = array.astype(dtype)
        is_kept = into in "fc" or bool((cast == array).all())
    if not is_kept:
        raise BufferMismatchError(
            f"variable {label!r}: {dtype} cannot hold the initial value, "
            f"{Spec(array.shape, array.dtype)}: numbers would be cut off; round or cast it first, "
            f"if that is intended"
        )
    return cast
