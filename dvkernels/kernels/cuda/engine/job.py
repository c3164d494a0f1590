"""Lays arrays out as the table of a launch (see launch_table.py), and starts it.

Arrays are those of devices/cuda_arrays.py: NumPy's, over memory of the device. What the addresses
of an item allow decides how it is run:

* vectors, where all arrays are dense and lie alike in their 16 bytes: what stands before the first
  whole vector, and after the last, is taken element by element;
* elements, where they are strided, or lie differently: neighbouring threads take neighbouring
  elements, so that dense lines are still read in whole sectors, by 8 times as many accesses;
* a dense copy, where an address is no multiple of the element's size, which no GPU can read: it is
  brought in and out byte by byte, two launches more and twice the memory of those arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda, cuda_arrays
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels import strides as walks
from dvkernels.kernels.cuda.engine import intrinsics, launch_table, launcher, loops, operations
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["Counts", "Item", "Order", "checked", "combine", "lay_out", "move", "repeated", "run"]

Array = np.ndarray[Any, Any]
Groups = Sequence[Sequence[Array]]

_VECTOR = intrinsics.VECTOR_NBYTES
_PER_THREAD = 4
_LONGEST = 1 << 30  # elements of an item with axes: their numbers are divided as 32 bits


class Order(NamedTuple):
    """Where a launch goes: a device, and a stream of it."""

    device: int
    stream: int


class Counts(NamedTuple):
    """How the arrays of a group are used."""

    num_sources: int
    num_targets: int
    first_target: int
    divisor: int


class Item(NamedTuple):
    """Arrays of one shape, and how their elements are taken."""

    axes: Sequence[tuple[int, tuple[int, ...]]]  # innermost first; none: dense
    before: int
    units: int
    after: int
    addresses: Sequence[int]


def checked(verb: str, op: Any, dtype: np.dtype[Any]) -> Reduction:
    """Return the reduction that ``op`` is or names; raise unless GPUs can do it on ``dtype``."""
    known = checks.reduction(verb, op, dtype)
    operations.told(known, dtype)
    return known


def combine(
    order: Order,
    op: Reduction,
    dtype: np.dtype[Any],
    groups: Groups,
    num_sources: int,
    *,
    in_place: bool = False,
) -> None:
    """Reduce the first arrays of each group, left to right, into the others, in one launch.

    In place, all arrays of a group are read, and all are written.
    """
    operation, code = operations.told(op, dtype)
    kernel = loops.kernel(operation, code)
    counts = _counts(op, len(groups[0]) if groups else 0, num_sources, in_place)
    run(order, kernel, code, groups, counts, num_sources)


def repeated(
    device: int, op: Reduction, arrays: Sequence[Array], num_sources: int, *, in_place: bool = False
) -> launcher.RepeatedLaunch | None:
    """Return the launch of :func:`combine` on one group, for others that lie alike.

    None where it depends on more than their addresses, or where nothing is to be launched: the
    arrays must be dense and begin at multiples of 16 bytes.
    """
    operation, code = operations.told(op, arrays[0].dtype)
    size = arithmetic.dtype_of(code).itemsize
    is_dense = all(
        array.flags.c_contiguous and checks.address(array) % _VECTOR == 0 for array in arrays
    )
    if not is_dense or not arrays[0].size:
        return None
    counts = _counts(op, len(arrays), num_sources, in_place)
    most = launcher.num_blocks(device)
    blocks, words = lay_out(_items(arrays, size), counts, launcher.threads(), most)
    if len(words) >= launch_table.NUM_WORDS:
        return None
    kernel = loops.kernel(operation, code)
    return launcher.RepeatedLaunch(kernel, device, blocks, words, len(arrays))


def _counts(op: Reduction, num_arrays: int, num_sources: int, in_place: bool) -> Counts:
    """Return how a reduction uses the arrays of a group."""
    first_target = 0 if in_place else num_sources
    divisor = num_sources if op is ReduceOp.MEAN else 1
    return Counts(num_sources, num_arrays - first_target, first_target, divisor)


def move(order: Order, groups: Groups) -> None:
    """Copy the first array of each group to all others: bytes, whatever the dtype.

    As integers as wide as all places and distances allow: the sum of one source is a copy.
    """
    marks = 0
    for arrays in groups:
        for array in arrays:
            marks |= checks.address(array) | array.itemsize
            for extent, stride in zip(array.shape, array.strides, strict=True):
                marks |= stride if extent > 1 else 0
    width = min(8, marks & -marks) if marks else 8
    combine(order, ReduceOp.SUM, np.dtype(f"i{width}"), groups, 1)


def run(
    order: Order,
    kernel: Callable[..., None],
    code: int,
    groups: Groups,
    counts: Counts,
    num_reads: int,
    numbers: Sequence[float] = (),
) -> None:
    """Run a kernel over groups of arrays of one dtype, in one launch.

    The first ``num_reads`` arrays of a group are read, those from ``counts.first_target`` on are
    written. ``numbers`` is what else the kernel needs to know.
    """
    filled = [[*arrays] for arrays in groups if arrays[0].size]
    if not filled:
        return
    copied_back: list[tuple[Array, Array]] = []
    kept = []  # what stand-ins lie in, until the work that uses it has its place on the stream
    for arrays in filled:
        for k, array in enumerate(arrays):
            if _is_aligned(array, arithmetic.number_nbytes(code)):
                continue
            own = cuda.arrays().empty(order.device, array.shape, array.dtype, order.stream)
            stand_in = cuda_arrays.place("staging", [own])[0].array
            kept.append(own)
            if k < num_reads:
                move(order, [[array, stand_in]])
            if k >= counts.first_target:
                copied_back.append((stand_in, array))
            arrays[k] = stand_in
    size = arithmetic.dtype_of(code).itemsize
    items = [item for arrays in filled for item in _items(arrays, size)]
    most = launcher.num_blocks(order.device)
    blocks, words = lay_out(items, counts, launcher.threads(), most, numbers)
    launcher.launch(kernel, order.device, blocks, words, order.stream)
    for stand_in, array in copied_back:
        move(order, [[stand_in, array]])


def lay_out(
    items: Sequence[Item],
    counts: Counts,
    threads: int,
    most_blocks: int,
    numbers: Sequence[float] = (),
) -> tuple[int, list[int]]:
    """Return the blocks of a launch and the words of its table."""
    # Large pieces once there are enough for every block; before that, one vector a thread.
    total = sum(-(-item.units // (_PER_THREAD * threads)) for item in items)
    per_thread = _PER_THREAD if total >= most_blocks or intrinsics.SIMULATED else 1
    heads: list[int] = []
    records: list[int] = []
    where = launch_table.HEADER + 2 * len(items)
    num_pieces = 0
    for axes, before, units, after, addresses in items:
        heads += (num_pieces, where + len(records))
        num_pieces += max(1, -(-units // (per_thread * threads)))
        is_alike = all(len({*strides}) == 1 for _, strides in axes)
        records += (len(axes), before, units, after, int(is_alike), *addresses)
        for extent, strides in axes:
            records += (extent, *strides)
    words = [
        num_pieces, len(items), *counts, per_thread, len(items[0].addresses), where + len(records),
        *heads, *records, *np.array(numbers, np.float64).view(np.int64).tolist(),
    ]  # fmt: skip
    return min(num_pieces, most_blocks), words


def _is_aligned(array: Array, size: int) -> bool:
    """Return whether a GPU can read each number: at multiples of its size."""
    if checks.address(array) % size:
        return False
    return all(
        stride % size == 0
        for extent, stride in zip(array.shape, array.strides, strict=True)
        if extent > 1
    )


def _items(arrays: Sequence[Array], size: int) -> list[Item]:
    """Return the items of a group; ``size`` is that of the elements the kernel knows."""
    axes = _merged(arrays, size)
    addresses = [*map(checks.address, arrays)]
    is_dense = not axes or (len(axes) == 1 and {*axes[0][1]} == {size})
    places = {address % _VECTOR for address in addresses}
    if is_dense and len(places) == 1:
        count = axes[0][0] if axes else 1
        (place,) = places
        before = min(count, -place % _VECTOR // size)
        num_vectors, after = divmod(count - before, _VECTOR // size)
        if -place % size == 0:
            return [Item((), before, num_vectors, after, addresses)]
    if not axes:
        axes = [(1, (size,) * len(arrays))]
    return [*_cut(axes, addresses)]


def _cut(axes: list[tuple[int, tuple[int, ...]]], addresses: list[int]) -> list[Item]:
    """Return items of no more elements than 32 bits count, cut along the outermost axis."""
    total = 1
    for extent, _ in axes:
        total *= extent
    if total <= _LONGEST:
        return [Item(axes, 0, total, 0, addresses)]
    *inner, (extent, strides) = axes
    half = extent // 2
    if half == 0:
        return _cut(inner, addresses)
    later = [address + half * stride for address, stride in zip(addresses, strides, strict=True)]
    return [
        *_cut([*inner, (half, strides)], addresses),
        *_cut([*inner, (extent - half, strides)], later),
    ]


def _merged(arrays: Sequence[Array], size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (extent, stride in each array) of the fewest axes, the innermost first.

    In elements of ``size`` bytes, of which one of the arrays' may hold several.
    """
    parts = arrays[0].itemsize // size
    found = [(parts, (size,) * len(arrays))] if parts > 1 else []
    for extent, strides in reversed(walks.merge_axes(arrays)):
        if found and strides == tuple(found[-1][0] * stride for stride in found[-1][1]):
            found[-1] = (found[-1][0] * extent, found[-1][1])
        else:
            found.append((extent, strides))
    return found
