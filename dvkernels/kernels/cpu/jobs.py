"""From checked arrays to a job: which memory, cut into which pieces, by which program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels.kernels import checks
from dvkernels.kernels.cpu import elementwise, pool
from dvkernels.reduce_op import ReduceOp

__all__ = ["TableProgram", "run"]

Array = np.ndarray[Any, Any]

# Given the addresses of the arrays and where the program starts in the job: the rows of the
# program and the tables they point to, as one flat list, and the number of rows.
TableProgram = Callable[[list[int]], tuple[list[int], int]]

# A helper joins 30 to 100 us after it is called. Two replicas of 512 KiB (2 MiB of reads and
# writes) take 26 us alone and 36 shared, of 1 MiB 46 and 54, of 2 MiB 83 and 75, of 4 MiB 159
# and 102 (medians, 2 cores of an AMD EPYC, November 2026): it pays from about 4 MiB.
_SHARED_NBYTES = 4 * 1024 * 1024
# Pieces are handed out dynamically: small enough that the last one is short (256 KiB a replica
# is 20 us), large enough that one claim (50 ns) and the restart of the prefetcher vanish.
_PIECE_NBYTES = 512 * 1024
_FAR_NBYTES = 64 * 1024 * 1024  # beyond the last cache of most machines (32 MiB on that one)
_LINE = 128  # bytes that one turn of the vector loop moves


def run(
    op: ReduceOp,
    reads: Sequence[Array],
    writes: Sequence[Array],
    program: TableProgram,
    *,
    num_chunks: int = 1,
    piece_nbytes: int = 0,
    dtype: np.dtype[Any] | None = None,
) -> None:
    """Run ``program`` over the arrays ``reads + writes`` (``reads`` alone where they are the same).

    ``piece_nbytes`` fixes the size of a piece where the bits depend on it. ``dtype`` is what the
    elements are computed as, where it is not their own (bytes).
    """
    first = reads[0]
    in_place = writes is reads
    operands = reads if in_place else [*reads, *writes]
    copies: list[tuple[Array, Array]] = []
    for array in operands:
        if not array.flags.c_contiguous:
            operands, copies = _as_spans(reads, writes)
            break
    dtype = dtype or first.dtype
    itemsize = dtype.itemsize
    count = first.nbytes // itemsize
    moved = first.nbytes * (len(reads) + len(writes))
    shared = moved >= _SHARED_NBYTES
    if piece_nbytes:
        piece = max(1, piece_nbytes // itemsize)
    elif shared:
        wanted = max(4096, min(_PIECE_NBYTES // len(reads), first.nbytes // 4))
        piece = (wanted & -_LINE) // itemsize
    else:
        piece = count or 1
    rows, num_rows = program([checks.address(array) for array in operands])
    num_pieces = -(-count // piece)
    head = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, num_pieces, piece, count, num_chunks]
    far = int(moved >= _FAR_NBYTES)
    job = np.array([*head, num_rows, far, 0, 0, *rows], np.int64)
    runner, witness = elementwise.kernel(op, dtype)
    pool.execute(runner, witness, job, shared and num_pieces > 1, copies)


def _as_spans(
    reads: Sequence[Array], writes: Sequence[Array]
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """Return arrays whose memory is dense and in one order, and the copies due at the end."""
    in_place = writes is reads
    operands = [*reads] if in_place else [*reads, *writes]
    # Dense in another order of axes (Fortran's, say), the same for all: it is only another order
    # of the elements, and the reduction does not care.
    strides = reads[0].strides
    axes = sorted(range(reads[0].ndim), key=lambda axis: -strides[axis])
    turned = [array.transpose(axes) for array in operands]
    if all(array.flags.c_contiguous for array in turned):
        return turned, []
    staged_reads = [np.array(a, order="C") if in_place else np.ascontiguousarray(a) for a in reads]
    if in_place:
        return staged_reads, list(zip(reads, staged_reads, strict=True))
    staged_writes = [np.empty(array.shape, array.dtype) for array in writes]
    return [*staged_reads, *staged_writes], list(zip(writes, staged_writes, strict=True))
