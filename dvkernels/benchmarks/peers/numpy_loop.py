"""NumPy on one thread, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.benchmarks.cases import Arrays

__all__: list[str] = []

_COMBINE = {
    "sum": np.add,
    "mean": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "prod": np.multiply,
}


def call(arrays: Arrays) -> Callable[[], object]:
    """Return the case's collective over the same arrays."""
    op = arrays.case.op
    buffers, out = arrays.buffers, arrays.out

    def reduce_into(total: Any, parts: list[Any]) -> None:
        combine: Any = _COMBINE[op]
        if len(parts) == 1:
            np.copyto(total, parts[0])
        else:
            combine(parts[0], parts[1], out=total)
        for part in parts[2:]:
            combine(total, part, out=total)
        if op == "mean":
            np.divide(total, len(parts), out=total)

    def all_reduce() -> None:
        reduce_into(buffers[0], buffers)
        broadcast()

    def broadcast() -> None:
        for buffer in buffers[1:]:
            np.copyto(buffer, buffers[0])

    def reduce() -> None:
        reduce_into(out[0], buffers)

    def reduce_scatter() -> None:
        for parts, total in zip(split, out, strict=True):
            reduce_into(total, list(parts))

    def all_gather() -> None:
        for result in out:
            np.concatenate(buffers, out=result)

    def all_to_all() -> None:
        for parts, result in zip(split, out, strict=True):
            np.concatenate(parts, out=result)

    split = list(zip(*(np.array_split(b, len(buffers)) for b in buffers), strict=True))
    calls: dict[str, Callable[[], None]] = {
        "all_reduce": all_reduce,
        "broadcast": broadcast,
        "reduce": reduce,
        "reduce_scatter": reduce_scatter,
        "all_gather": all_gather,
        "all_to_all": all_to_all,
    }
    return calls[arrays.case.collective]
