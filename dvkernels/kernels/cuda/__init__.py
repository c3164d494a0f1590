"""Collectives on arrays in GPU memory: kernels shipped as PTX, launched through the driver.

The functions are those of :mod:`dvkernels.kernels`, with one more parameter ``stream``: one stream,
or one for each buffer, of CuPy, PyTorch or Numba, or its address. None means the current stream of
the library that each array comes from: the kernel waits for the work that this stream already
holds, and work put on the stream afterwards waits for the kernel. The host waits for neither.

Modules are twins of those of the same name in ``kernels/cpu``. Four CPU modules have no twin here,
on purpose: ``shm_all_reduce`` (worker processes share host memory, not device memory), ``group``
(collectives inside ``@njit`` functions of threads), ``feistel`` (a permutation that the input
pipeline computes on the host) and ``compile_ahead`` (the kernels ship as PTX, which the driver
assembles for the device at hand and keeps on disk; see ``engine/shipped_ptx.py``).

Imports: devices, errors, kernels, profiler, reduce_op, schedules, threads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cuda import direct, optimizers, ring
from dvkernels.kernels.cuda.broadcast import broadcast
from dvkernels.kernels.cuda.direct import aggregate_mean, aggregate_sum, direct_all_reduce, reduce
from dvkernels.kernels.cuda.direct import reduce_unchecked as reduce_unchecked
from dvkernels.kernels.cuda.engine.call import NEW
from dvkernels.kernels.cuda.gather import all_gather, all_to_all, reduce_scatter
from dvkernels.kernels.cuda.gather import all_gather_unchecked as all_gather_unchecked
from dvkernels.kernels.cuda.gather import reduce_scatter_unchecked as reduce_scatter_unchecked
from dvkernels.kernels.cuda.many import all_reduce_many
from dvkernels.kernels.cuda.multi_gpu.all_reduce import abort, recover
from dvkernels.kernels.cuda.ring import ring_all_reduce
from dvkernels.reduce_op import Reduction

# The *_unchecked functions are for communicators, whose callers have checked the arguments: no part
# of the interface.
__all__ = [
    "abort",
    "aggregate_mean",
    "aggregate_sum",
    "all_gather",
    "all_reduce",
    "all_reduce_many",
    "all_to_all",
    "broadcast",
    "direct_all_reduce",
    "optimizers",
    "recover",
    "reduce",
    "reduce_scatter",
    "ring_all_reduce",
]


def _cheapest(
    verb: str, buffers: Any, op: Any, out: Any, stream: Any, is_checked: bool = False
) -> list[Any]:
    """Reduce directly within a GPU, which moves the least bytes; between GPUs as is best there."""
    return direct.all_reduce_as(
        verb, buffers, op, out, stream, between_gpus="auto", is_checked=is_checked
    )


_ALGORITHMS: dict[str, Callable[..., list[Any]]] = {
    "auto": _cheapest,
    "direct": direct.all_reduce_as,
    "ring": ring.all_reduce_as,
}


def all_reduce_unchecked(
    arrays: Sequence[Any], op: Reduction, algorithm: str, out: Sequence[Any] | None = None
) -> list[Any]:
    """Reduce into new arrays, or into ``out``, which may be the arrays themselves.

    The caller has checked the arguments, but not that no array of ``out`` shares an element with
    another array: their addresses are read here.
    """
    targets = NEW if out is None else None if all(map(operator.is_, out, arrays)) else out
    return _ALGORITHMS[algorithm]("all_reduce", arrays, op, targets, None, is_checked=True)


def all_reduce(
    buffers: Any, op: Any = "sum", *, algorithm: Any = "auto", out: Any = None, stream: Any = None
) -> list[Any]:
    """Leave the reduction in every buffer (or ``out``); see :func:`dvkernels.kernels`."""
    chosen = checks.algorithm("all_reduce", algorithm, _ALGORITHMS)
    return chosen("all_reduce", buffers, op, out, stream)
