"""Weights of the replicas in a weighted mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Array, refuse_masked
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.user_errors import brief
from dvkernels.values import scalar_checks

__all__: list[str] = []


def checked(weight: Any, verb: str, op: Reduction) -> float:
    """Return a weight as a float; raise unless ``op`` is MEAN and the weight finite and >= 0."""
    if op is not ReduceOp.MEAN:
        raise ValueError(f"{verb}: a weight belongs to MEAN, got op {op.name}; drop the weight")
    refuse_masked(weight, f"{verb}: the weight")
    number = scalar_checks.real(weight)
    if not 0 <= number < float("inf"):
        raise ValueError(
            f"{verb}: a weight is a finite number of at least 0, got {brief(weight, 60)}"
        )
    return number


def normalized_shares(local: Sequence[float], workers: Workers, verb: str) -> list[float] | None:
    """Return the local weights divided by the sum over all replicas; None if all are equal.

    Every worker must call this, with one weight per local replica.
    """
    per_worker = workers.exchange([*local])
    weights = [weight for each in per_worker for weight in each]
    if local[0] and all(weight == local[0] for weight in weights):
        return None
    start = sum(map(len, per_worker[: workers.rank]))
    return reduce_op.shares(weights, verb)[start : start + len(local)]


def scaled_shares(columns: Sequence[Sequence[Array]], shares: Sequence[float]) -> list[list[Any]]:
    """Return each column, one array per replica, with its arrays scaled by the shares.

    The sum of a scaled column is the weighted mean. A share of 0 gives zeros whatever the array
    holds, because NaN * 0 would spoil the sum. float16 and bfloat16 are scaled in float32, so that
    only the sum is rounded.
    """
    return [
        [
            array_memory.holding(array).apply(_scaled, array, share)
            for array, share in zip(column, shares, strict=True)
        ]
        for column in columns
    ]


def _scaled(array: Any, share: float) -> Any:
    dtype = reduce_op.working_dtype(array.dtype)
    if not share:
        return np.zeros_like(array, dtype)
    wide = array.astype(dtype, copy=False)
    return np.multiply(wide, dtype.type(share), out=np.empty_like(wide))
