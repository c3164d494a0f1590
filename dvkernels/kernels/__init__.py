"""Collectives over plain arrays of one process, in host or GPU memory.

Every function takes one array per replica and calls the twin, CPU or CUDA, of the memory in which
the arrays lie. Nothing is compiled, and Numba is not imported, until a function is called.

Imports: custom_reduction, deadlines, devices, errors, profiler, reduce_op, schedules, threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda as _cuda_devices
from dvkernels.devices import interop
from dvkernels.errors import DeviceError
from dvkernels.kernels import backends, checks
from dvkernels.reduce_op import Reduction

__all__ = [
    "aggregate_mean",
    "aggregate_sum",
    "all_gather",
    "all_reduce",
    "all_reduce_many",
    "all_to_all",
    "broadcast",
    "cpu",
    "cuda",
    "direct_all_reduce",
    "reduce",
    "reduce_scatter",
    "ring_all_reduce",
]


def __getattr__(name: str) -> Any:
    """Import a twin at the first access to its name."""
    if name == "cpu":
        return backends.cpu()
    if name == "cuda":
        return backends.cuda()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _twin(verb: str, buffers: Any) -> tuple[Any, Any]:
    """Return the twin for ``buffers``, and the buffers as a sequence; the twin checks them."""
    try:
        first = buffers[0]
    except Exception:  # not a sequence, or an empty one
        buffers = checks.as_sequence(verb, buffers)
        first = buffers[0] if buffers else None
    if type(first) is not np.ndarray and interop.is_on_gpu(first):
        problem = _cuda_devices.missing()
        if problem:
            raise DeviceError(f"{verb}: replica 0 is in GPU memory, and {problem}")
        return backends.cuda(), buffers
    return backends.cpu(), buffers


def all_reduce(
    buffers: Sequence[Any],
    op: Reduction | str = "sum",
    *,
    algorithm: str = "auto",
    out: Sequence[Any] | None = None,
) -> list[Any]:
    """Reduce the buffers elementwise and leave the result in every one of them.

    Parameters
    ----------
    buffers : sequence of array, one shape and dtype
        One per replica: NumPy arrays, writable CPU arrays that support DLPack, or arrays on one
        GPU (of CuPy, PyTorch, Numba, or any library with ``__cuda_array_interface__`` or DLPack).
        Overwritten, unless ``out`` is given.
    op : ReduceOp, CustomReduction or str
        ``"sum"``, ``"mean"``, ``"min"``, ``"max"`` or ``"prod"``. Integers have no mean and
        their sums wrap; bool has min and max; min and max propagate NaN; complex numbers have
        sum, mean and prod. float16 and bfloat16 are combined in float32 and rounded once.
    algorithm : {"auto", "direct", "ring"}
        Algorithm of the all-reduce. Each leaves the same bits on every replica; the last bits of
        floating-point results may differ between two algorithms.
    out : sequence of array, optional
        Arrays for the results, one per replica, of the buffers' shape and dtype; the buffers are
        not changed.

    Returns
    -------
    list of array
        ``out``, or the buffers themselves.

    Raises
    ------
    BufferMismatchError
        Shapes or dtypes differ, written buffers share an element or are read-only, ``out`` does
        not fit, or there is no buffer. No buffer has been touched; this holds for all errors.
    NotABufferError
        A buffer is not an array, or is a masked one.
    UnsupportedDTypeError
        ``op`` is not defined for the dtype.
    ReduceOpError, AlgorithmError
        No reduction, or no algorithm, has that name.
    DeviceError
        The buffers are on a GPU, and a library or driver for it is missing: the message says
        which to install.

    Notes
    -----
    On a GPU the kernels are launched on the current stream of each array's library, and the host
    does not wait for them; the functions of ``dvkernels.kernels.cuda`` take others.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> a, b = np.float32([1, 2]), np.float32([10, 20])
    >>> results = kernels.all_reduce([a, b])
    >>> b
    array([11., 22.], dtype=float32)
    """
    twin, buffers = _twin("all_reduce", buffers)
    results: list[Any] = twin.all_reduce(buffers, op, algorithm=algorithm, out=out)
    return results


def ring_all_reduce(
    buffers: Sequence[Any], op: Reduction | str = "sum", *, out: Sequence[Any] | None = None
) -> list[Any]:
    """Reduce around a ring: reduce-scatter, then all-gather.

    Arguments, result and errors are those of :func:`all_reduce`, but for ``algorithm``; the buffers
    are in ring order.

    Notes
    -----
    With p replicas, 2(p - 1) ticks; each replica sends 2(p - 1)/p of its buffer, the least
    possible [1]_. In one memory, where nothing need be sent, the additions are those of the ring,
    in its order, and the partial sums stay in registers. The sum of each chunk starts at another
    replica, so the bits may depend on p and differ from those of :func:`direct_all_reduce`, but not
    between replicas or runs.

    References
    ----------
    .. [1] P. Patarasuk, X. Yuan, J. Parallel Distrib. Comput. 69(2), 117-124 (2009),
       doi:10.1016/j.jpdc.2008.09.002.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.ring_all_reduce([np.array([1, 5]), np.array([4, 2])], "max")
    [array([4, 5]), array([4, 5])]
    """
    twin, buffers = _twin("ring_all_reduce", buffers)
    results: list[Any] = twin.ring_all_reduce(buffers, op, out=out)
    return results


def direct_all_reduce(
    buffers: Sequence[Any], op: Reduction | str = "sum", *, out: Sequence[Any] | None = None
) -> list[Any]:
    """Reduce in one pass over memory: each element is read and written once per replica.

    Arguments, result and errors are those of :func:`all_reduce`, but for ``algorithm``.

    Notes
    -----
    R replicas of S bytes move 2 R S bytes in place. The bits are those of NumPy's
    ``buffers[0] + buffers[1] + ...``, left to right.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.direct_all_reduce([np.array([1.0, 2.0]), np.array([3.0, 6.0])], "mean")
    [array([2., 4.]), array([2., 4.])]
    """
    twin, buffers = _twin("direct_all_reduce", buffers)
    results: list[Any] = twin.direct_all_reduce(buffers, op, out=out)
    return results


def broadcast(buffers: Sequence[Any], root: int = 0) -> list[Any]:
    """Copy ``buffers[root]`` into every buffer.

    Parameters
    ----------
    buffers : sequence of array, one shape and dtype
        One per replica; any dtype but object. All but the root's are overwritten.
    root : int
        Replica whose buffer is copied.

    Returns
    -------
    list of array
        The buffers themselves.

    Raises
    ------
    BufferMismatchError
        As in :func:`all_reduce`, or ``root`` is not a replica.
    NotABufferError, UnsupportedDTypeError
        A buffer is not an array; an array holds Python objects.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.broadcast([np.array([1, 2]), np.array([3, 4])], root=1)
    [array([3, 4]), array([3, 4])]
    """
    twin, buffers = _twin("broadcast", buffers)
    results: list[Any] = twin.broadcast(buffers, root)
    return results


def reduce(buffers: Sequence[Any], op: Reduction | str = "sum", *, out: Any = None) -> Any:
    """Reduce the buffers elementwise to one array.

    Parameters
    ----------
    buffers : sequence of array, one shape and dtype
        One per replica; not changed, and may be read-only.
    op : ReduceOp or str
        As in :func:`all_reduce`.
    out : array, optional
        Array for the result, of the buffers' shape and dtype.

    Returns
    -------
    array
        A new array, or ``out``.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError
        As in :func:`all_reduce`.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.reduce([np.array([1, 2]), np.array([3, 4])], "prod")
    array([3, 8])
    """
    twin, buffers = _twin("reduce", buffers)
    return twin.reduce(buffers, op, out=out)


def aggregate_sum(buffers: Sequence[Any], *, out: Any = None) -> Any:
    """Sum the buffers into one array: :func:`reduce` with the op fixed.

    Arguments, result and errors are those of :func:`reduce`.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.aggregate_sum([np.array([1, 2]), np.array([3, 4])])
    array([4, 6])
    """
    twin, buffers = _twin("aggregate_sum", buffers)
    return twin.aggregate_sum(buffers, out=out)


def aggregate_mean(buffers: Sequence[Any], *, out: Any = None) -> Any:
    """Average the buffers into one array: :func:`reduce` with the op fixed.

    Arguments, result and errors are those of :func:`reduce`; the dtype is a floating-point one.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.aggregate_mean([np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    array([2., 3.])
    """
    twin, buffers = _twin("aggregate_mean", buffers)
    return twin.aggregate_mean(buffers, out=out)


def reduce_scatter(
    buffers: Sequence[Any], op: Reduction | str = "sum", *, out: Sequence[Any] | None = None
) -> list[Any]:
    """Reduce the buffers elementwise and leave part r of the result on replica r.

    Parameters
    ----------
    buffers : sequence of array, one shape and dtype
        One per replica, of at least one axis; not changed, and may be read-only.
    op : ReduceOp or str
        As in :func:`all_reduce`.
    out : sequence of array, optional
        Arrays for the parts, one per replica, of the parts' shapes and the buffers' dtype.

    Returns
    -------
    list of array
        New arrays, or ``out``: the parts of ``numpy.array_split(reduction, N)`` along axis 0.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError
        As in :func:`all_reduce`, or the arrays have no axis.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.reduce_scatter([np.array([1, 2, 3]), np.array([10, 20, 30])])
    [array([11, 22]), array([33])]
    """
    twin, buffers = _twin("reduce_scatter", buffers)
    results: list[Any] = twin.reduce_scatter(buffers, op, out=out)
    return results


def all_gather(
    buffers: Sequence[Any], axis: int = 0, *, out: Sequence[Any] | None = None
) -> list[Any]:
    """Concatenate all buffers on every replica.

    Parameters
    ----------
    buffers : sequence of array, one dtype
        One per replica; their shapes may differ along ``axis``. Not changed, and may be
        read-only; any dtype but object.
    axis : int
        Axis of the concatenation; a negative one counts from the end.
    out : sequence of array, optional
        Arrays for the results, one per replica, of the concatenation's shape and the buffers'
        dtype.

    Returns
    -------
    list of array
        New arrays, or ``out``.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError
        As in :func:`all_reduce`, or the buffers have no such axis.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.all_gather([np.array([1, 2]), np.array([3])])
    [array([1, 2, 3]), array([1, 2, 3])]
    """
    twin, buffers = _twin("all_gather", buffers)
    results: list[Any] = twin.all_gather(buffers, axis, out=out)
    return results


def all_to_all(buffers: Sequence[Any], *, out: Sequence[Any] | None = None) -> list[Any]:
    """Send part i of every buffer to replica i: part i of buffer j becomes part j of result i.

    Parameters
    ----------
    buffers : sequence of array, one shape and dtype
        One per replica, of at least one axis; split along axis 0 as by ``numpy.array_split``.
        Not changed, and may be read-only; any dtype but object.
    out : sequence of array, optional
        Arrays for the results, one per replica, of the results' shapes and the buffers' dtype.

    Returns
    -------
    list of array
        New arrays, or ``out``.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError
        As in :func:`all_reduce`, or the arrays have no axis.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.all_to_all([np.array([1, 2, 3]), np.array([10, 20, 30])])
    [array([ 1,  2, 10, 20]), array([ 3, 30])]
    """
    twin, buffers = _twin("all_to_all", buffers)
    results: list[Any] = twin.all_to_all(buffers, out=out)
    return results


def all_reduce_many(
    groups: Sequence[Sequence[Any]], op: Reduction | str = "sum"
) -> list[list[Any]]:
    """Reduce many arrays in one call, in place, without copying them into a fusion buffer.

    Parameters
    ----------
    groups : sequence of sequence of array
        ``groups[k]`` holds the N buffers of array k, one per replica, of one shape and dtype.
        Shape and dtype may differ between the arrays. Overwritten.
    op : ReduceOp or str
        As in :func:`all_reduce`, for every array.

    Returns
    -------
    list of list of array
        The buffers themselves.

    Raises
    ------
    BufferMismatchError, NotABufferError, UnsupportedDTypeError, ReduceOpError
        As in :func:`all_reduce`, with the index of the array; or the numbers of replicas differ.
        No buffer of any array has been touched.

    Notes
    -----
    The bits are those of :func:`direct_all_reduce`. Contiguous NumPy arrays of one dtype cost
    about 0.3 us each beyond the bytes they move.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> weights, bias = [np.ones(3), np.ones(3)], [np.zeros(1), np.ones(1)]
    >>> kernels.all_reduce_many([weights, bias], "mean")
    [[array([1., 1., 1.]), array([1., 1., 1.])], [array([0.5]), array([0.5])]]
    """
    groups = checks.groups_as_lists("all_reduce_many", groups)
    twin, _ = _twin("all_reduce_many", groups[0] if groups else ())
    results: list[list[Any]] = twin.all_reduce_many(groups, op)
    return results
