"""All-reduce over shared memory by the kernels, where compiled code declines: custom reductions.

Workers stage the same pieces in the same rounds as in ``kernels/cpu/shm_all_reduce.py``: those for
which compiled code does not decline may take part.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.consistency import Fingerprint
from dvkernels.communicators.workers.shm.segment import BUFFER_NBYTES
from dvkernels.communicators.workers.shm.symmetric_memory import Columns
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import direct
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition

__all__: list[str] = []

# Carries out a round: call, bytes, and what stages them in the buffer of a parity.
Round: TypeAlias = Callable[[Fingerprint, int, Callable[[int], None]], int]

_MAX_VIEWS = 256
_LINE = 64
_NO_PIECE, _NO_RESULT = slice(0), np.empty(0)


@final
class KernelReduction:
    """One worker's side of the all-reduce by the kernels.

    ``carry_out`` carries out a round, and returns the parity in which all workers agreed.
    """

    def __init__(self, rank: int, size: int, buffers: HostArray, carry_out: Round) -> None:
        self._rank, self._size = rank, size
        self._buffers = buffers  # by round parity and worker, result buffers last
        self._round = carry_out
        self._views: dict[Any, list[list[HostArray]]] = {}

    def all_reduce(
        self,
        columns: Columns,
        num_sources: int,
        op: Reduction,
        call: Fingerprint,
        divisor: int,
        in_parts: bool,
    ) -> None:
        """Reduce all columns as one packed column; other workers may reduce them unpacked.

        ``in_parts``: each worker combines a part of each piece, and copies all a round later.
        """
        is_packed = len(columns) > 1
        packed = [
            np.concatenate(arrays) if is_packed else arrays[0]
            for arrays in zip(*columns, strict=True)
        ]
        sources, targets = packed[:num_sources], packed[num_sources:]
        step = BUFFER_NBYTES // sources[0].itemsize
        pieces = [slice(k, k + step) for k in range(0, max(1, sources[0].size), step)]
        result, before = _NO_RESULT, _NO_PIECE
        for here in [*pieces, _NO_PIECE] if in_parts else pieces:
            views = self._exchange_staged([source[here] for source in sources], op, call)
            if in_parts:
                for target in targets:
                    target[before] = result
                result, before = views[self._size], here
                self._combine_part(views, op, divisor)
                continue
            first, *others = (target[here] for target in targets)
            direct.reduce(views[: self._size], op, out=first)
            accumulation.divide(first, divisor)
            for other in others:
                other[...] = first
        if is_packed:
            starts = partition.starts(column[0].size for column in columns)
            for column, (start, stop) in zip(columns, itertools.pairwise(starts), strict=True):
                for target, whole in zip(column[num_sources:], targets, strict=True):
                    target[...] = whole[start:stop]

    def _combine_part(self, views: Sequence[HostArray], op: Reduction, divisor: int) -> None:
        """Reduce this worker's part of all staging buffers into the result buffer behind them."""
        *buffers, result = views
        per_line = _LINE // result.itemsize
        count = -(-result.size // per_line)
        low, high = (count * k // self._size * per_line for k in (self._rank, self._rank + 1))
        if low < min(high, result.size):
            direct.reduce([buffer[low:high] for buffer in buffers], op, out=result[low:high])
            accumulation.divide(result[low:high], divisor)

    def _exchange_staged(
        self, pieces: Sequence[HostArray], op: Reduction, call: Fingerprint
    ) -> list[HostArray]:
        """Stage the reduction of ``pieces``; return the buffers once all workers have staged."""
        views = self._staged_views(pieces[0].dtype, pieces[0].size)
        stage = functools.partial(_stage_reduction, views, self._rank, pieces, op)
        return views[self._round(call, pieces[0].nbytes, stage)]

    def _staged_views(self, dtype: np.dtype[Any], size: int) -> list[list[HostArray]]:
        """Return the start of each buffer as an array, by parity and worker."""
        found = self._views.get((dtype, size))
        if found is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            nbytes = size * dtype.itemsize
            found = [[buffer[:nbytes].view(dtype) for buffer in half] for half in self._buffers]
            self._views[dtype, size] = found
        return found


def _stage_reduction(
    views: Sequence[Sequence[HostArray]],
    rank: int,
    pieces: Sequence[HostArray],
    op: Reduction,
    parity: int,
) -> None:
    direct.reduce(pieces, op, out=views[parity][rank])
