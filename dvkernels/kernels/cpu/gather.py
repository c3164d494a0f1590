"""Reduce-scatter, all-gather and all-to-all: collectives that split or join buffers.

Each is one job over slices: a contiguous slice is moved as a whole, another line by line. Bytes
moved for R replicas of S bytes, without the reads for ownership of new memory:
reduce_scatter R S + S, all_gather R S + R R S, all_to_all 2 R S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels.devices import interop
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks, slices
from dvkernels.kernels.cpu.engine import job
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__ = ["all_gather", "all_to_all", "reduce_scatter"]


def reduce_scatter(buffers: Any, op: Any = "sum", *, out: Any = None) -> list[Any]:
    """Return part r of the reduction for replica r; see :func:`dvkernels.kernels`."""
    buffers, out = _as_sequences("reduce_scatter", buffers, out)
    reads = checks.arrays("reduce_scatter", buffers)
    op = checks.reduction("reduce_scatter", op, reads[0].dtype)
    checks.check_axis("reduce_scatter", 0, reads[0])
    return _results(reduce_scatter_unchecked(reads, op, out), buffers, out)


def reduce_scatter_unchecked(
    reads: Sequence[HostArray], op: Reduction, out: Sequence[Any] | None = None
) -> list[HostArray]:
    """Return part r of the reduction for replica r; the caller has checked all but ``out``."""
    count = len(reads)
    parts = partition.parts(len(reads[0]), count)
    rest = reads[0].shape[1:]
    writes = checks.outputs("reduce_scatter", reads, out, [(b - a, *rest) for a, b in parts])
    groups = slices.scattered(reads, parts, writes)
    program = job.combine(count, 1, job.divisor(op, count))
    job.run(op, reads[0].dtype, groups, program)
    return writes


def all_gather(buffers: Any, axis: Any = 0, *, out: Any = None) -> list[Any]:
    """Return the concatenation, one for each replica; see :func:`dvkernels.kernels`."""
    buffers, out = _as_sequences("all_gather", buffers, out)
    reads, axis = checks.arrays_along("all_gather", buffers, axis)
    checks.check_dtype_moves("all_gather", reads[0].dtype)
    return _results(all_gather_unchecked(reads, axis, out), buffers, out)


def all_gather_unchecked(
    reads: Sequence[HostArray], axis: int, out: Sequence[Any] | None = None
) -> list[HostArray]:
    """Return the concatenation for each replica; the caller has checked all but ``out``."""
    whole = slices.joined_shape(reads, axis)
    writes = checks.outputs("all_gather", reads, out, [whole] * len(reads))
    job.move(slices.gathered(reads, axis, writes))
    return writes


def all_to_all(buffers: Any, *, out: Any = None) -> list[Any]:
    """Return, for replica i, part i of every buffer, in the order of the buffers."""
    buffers, out = _as_sequences("all_to_all", buffers, out)
    reads = checks.arrays("all_to_all", buffers)
    checks.check_dtype_moves("all_to_all", reads[0].dtype)
    checks.check_axis("all_to_all", 0, reads[0])
    count = len(reads)
    parts = partition.parts(len(reads[0]), count)
    rest = reads[0].shape[1:]
    shapes = [(count * (stop - start), *rest) for start, stop in parts]
    writes = checks.outputs("all_to_all", reads, out, shapes)
    job.move(slices.exchanged(reads, parts, writes))
    return _results(writes, buffers, out)


def _as_sequences(verb: str, buffers: Any, out: Any) -> tuple[Any, Any]:
    """Return both as lists or tuples, which can be iterated over again."""
    buffers = checks.as_sequence(verb, buffers)
    return buffers, out if out is None else checks.as_sequence(verb, out, "out")


def _results(writes: list[HostArray], buffers: Any, out: Any) -> list[Any]:
    if out is not None:
        return list(out)
    return [interop.like(write, buffer) for write, buffer in zip(writes, buffers, strict=True)]
