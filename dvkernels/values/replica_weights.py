"""How much each replica counts in a weighted mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory
from dvkernels.devices.buffers import refuse_masked
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.user_errors import shown
from dvkernels.values import scalar_checks

__all__: list[str] = []


def checked(weight: Any, verb: str, op: Reduction) -> float:
    """Return a weight as a float; raise unless it is a finite number of at least 0, for MEAN."""
    if op is not ReduceOp.MEAN:
        raise ValueError(f"{verb}: a weight belongs to MEAN, got op {op.name}; drop the weight")
    refuse_masked(weight, f"{verb}: the weight")
    number = scalar_checks.real(weight)
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"{verb}: a weight is a finite number of at least 0, got {shown(weight, 60)}"
        )
    return number


def shares_over(local: Sequence[float], workers: Workers, verb: str) -> list[float] | None:
    """Return what the weights of this process are of the sum over all; None where all are equal.

    Every worker must call this, with as many weights as it has replicas.
    """
    per_worker = workers.exchange([*local])
    of_all = [weight for each in per_worker for weight in each]
    if local[0] and all(other == local[0] for other in of_all):
        return None
    first = sum(map(len, per_worker[: workers.rank]))
    return reduce_op.shares(of_all, verb)[first : first + len(local)]


def share_of(array: Any, share: float) -> Any:
    """Return a share of an array, of which the sum over the replicas is the weighted mean.

    A share of 0 gives zeros, whatever the array holds, so that NaN x 0 does not spoil the sum.
    Shares of a half type are float32, so that only the sum is rounded to the half.
    """
    dtype = reduce_op.working_dtype(array.dtype)
    here = array_memory.holding(array).apply
    if not share:
        return here(np.zeros_like, array, dtype)
    return here(_scaled, array.astype(dtype, copy=False), dtype.type(share))


def _scaled(array: Any, factor: Any) -> Any:
    return np.multiply(array, factor, out=np.empty_like(array))


def shares_of(columns: Sequence[Sequence[Any]], shares: Sequence[float]) -> list[list[Any]]:
    """Return the shares of the arrays of each column, one array a replica."""
    return [
        [share_of(array, share) for array, share in zip(column, shares, strict=True)]
        for column in columns
    ]
