"""Row gradient: the gradient of some rows of a variable, and the step that changes only these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices.array_spec import HostArray, Spec, spec
from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import backends, update_rules
from dvkernels.profiler import debugging
from dvkernels.reduce_op import ReduceOp
from dvkernels.values.operands import as_array
from dvkernels.variables.rows import checked_rows
from dvkernels.variables.variable import Variable, storage_of

__all__: list[str] = []


class RowGradient(NamedTuple):
    """Gradients of rows: ``slopes[k]`` is that of row ``rows[k]``; several of one row add up."""

    rows: HostArray  # int64, of shape (n,)
    slopes: HostArray


def checked(verb: str, gradient: tuple[Any, Any], variable: Variable, replica: int) -> RowGradient:
    """Return a pair of row indices and slopes as arrays; raise if they do not fit the variable."""
    copies = storage_of(variable)
    rows = checked_rows(copies, verb, gradient[0], replica)
    slopes: Any = as_array(gradient[1], verb, replica, copies.memory)
    expected = Spec((*rows.shape, *variable.shape[1:]), variable.dtype)
    if spec(slopes) != expected:
        raise BufferMismatchError(
            f"{verb} expected a gradient of {len(rows.reshape(-1))} rows of {variable.name!r} of "
            f"{expected}, got {spec(slopes)} from replica {replica}; cast with .astype or reshape "
            f"it first"
        )
    if debugging.active is not None:
        debugging.check_finite(f"{verb}: the gradient of {variable.name!r}", [slopes])
    flat = slopes.reshape(rows.size, *variable.shape[1:])
    return RowGradient(rows.reshape(-1), np.ascontiguousarray(flat))


def take_row_step(
    rule: update_rules.Rule, tables: Sequence[HostArray], gradient: RowGradient
) -> None:
    """Apply an update rule to the rows of a gradient, in a variable and its slots.

    The rows are taken out, changed by the kernel that changes whole arrays, and put back by one
    call, which no interrupt cuts.
    """
    rows, places = np.unique(gradient.rows, return_inverse=True)
    if len(rows) == 0:
        return
    kernel = backends.row_updates()
    slopes = gradient.slopes
    if len(rows) < len(gradient.rows):
        slopes = np.zeros((len(rows), *slopes.shape[1:]), slopes.dtype)
        places = places.reshape(-1).astype(np.int64, copy=False)
        kernel.update_rows("scatter_add", [kernel.RowWrite([slopes], places, gradient.slopes)])
    else:  # each row once: in the order of the rows
        slopes = slopes[np.argsort(gradient.rows)]
    taken = [table[rows] for table in tables]
    backends.of(tables[0]).optimizers.take_step(
        "apply_gradients",
        rule,
        [[slopes]],
        [[[content]] for content in taken],
        ReduceOp.MEAN,
        is_checked=True,
    )
    writes = [
        kernel.RowWrite([table], rows, content)
        for table, content in zip(tables, taken, strict=True)
    ]
    kernel.update_rows("scatter_update", writes)
