"""Jobs: arrays laid out as a launch table (see table_layout.py), and the launch over it.

Arrays are the NumPy descriptions of devices/cuda_arrays.py, over device memory. The addresses and
strides of an item decide how its elements are accessed:

* as vectors of 16 bytes, where all arrays are contiguous and have the same alignment modulo 16; the
  elements before the first whole vector and after the last are accessed one by one;
* as elements, where arrays are strided or differ in alignment: neighbouring threads take
  neighbouring elements, so that contiguous lines are still read in whole sectors, with up to 8
  times as many accesses;
* through a contiguous staging copy, where an address is not a multiple of the element's size, which
  a GPU cannot access: it is copied in and out byte by byte, with two more launches and twice the
  memory of those arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda_arrays
from dvkernels.devices.array_spec import HostArray
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels import strides as array_strides
from dvkernels.kernels.cuda.engine import catalogue, launcher, operations, table_layout
from dvkernels.kernels.cuda.engine.kernel import Kernel
from dvkernels.kernels.cuda.engine.table_layout import ItemHead, ItemRecord, TableHeader
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["Counts", "Item", "check_op", "combine", "lay_out", "move", "repeated", "run"]

Groups = Sequence[Sequence[HostArray]]

_VECTOR = table_layout.VECTOR_NBYTES
_PER_THREAD = 4
# Blocks of a launch, in multiples of those that run at once: each of its blocks then takes as many
# pieces as the others. One would do on an idle GPU. With four, work of another stream that leaves
# no room for some of the first blocks delays a quarter of the work, not all of it.
_WAVES = 4
_LONGEST = 1 << 30  # elements of an item with axes: their indices are divided in 32 bits


class Counts(NamedTuple):
    """Numbers of sources and targets in a group of arrays, and the divisor of the reduction."""

    num_sources: int
    num_targets: int
    first_target: int
    divisor: int


class Item(NamedTuple):
    """Arrays of one shape, and the access pattern of their elements."""

    axes: Sequence[tuple[int, tuple[int, ...]]]  # (extent, strides), innermost first; none: dense
    before: int  # elements before the first whole vector
    units: int  # whole vectors; elements where there are axes
    after: int  # elements after the last whole vector
    addresses: Sequence[int]


def check_op(verb: str, op: Any, dtype: np.dtype[Any]) -> Reduction:
    """Return the reduction that ``op`` is or names; raise unless GPUs support it on ``dtype``."""
    known = checks.reduction(verb, op, dtype)
    operations.resolve(known, dtype)
    return known


def combine(
    work_stream: DeviceStream,
    op: Reduction,
    dtype: np.dtype[Any],
    groups: Groups,
    num_sources: int,
    *,
    in_place: bool = False,
) -> None:
    """Reduce the first arrays of each group, left to right, into its other arrays, in one launch.

    In place, all arrays of a group are both sources and targets.
    """
    operation, code = operations.resolve(op, dtype)
    counts = _counts(op, len(groups[0]) if groups else 0, num_sources, in_place)
    run(work_stream, catalogue.collective(operation, code), code, groups, counts, num_sources)


def repeated(
    device: int,
    op: Reduction,
    arrays: Sequence[HostArray],
    num_sources: int,
    *,
    in_place: bool = False,
) -> launcher.RepeatedLaunch | None:
    """Return the launch of :func:`combine` on one group, to be repeated with other addresses.

    None where the launch depends on more than the addresses, or where there is nothing to launch:
    the arrays must be contiguous and begin at multiples of 16 bytes.
    """
    operation, code = operations.resolve(op, arrays[0].dtype)
    size = arithmetic.dtype_of(code).itemsize
    is_dense = all(
        array.flags.c_contiguous and checks.address(array) % _VECTOR == 0 for array in arrays
    )
    if not is_dense or not arrays[0].size:
        return None
    counts = _counts(op, len(arrays), num_sources, in_place)
    kernel = catalogue.collective(operation, code)
    num_resident = launcher.num_resident(kernel, device)
    blocks, words = lay_out(_items(arrays, size), counts, kernel.launch_bounds[0], num_resident)
    if len(words) >= table_layout.NUM_WORDS:
        return None
    return launcher.RepeatedLaunch(kernel, device, blocks, words, len(arrays))


def _counts(op: Reduction, num_arrays: int, num_sources: int, in_place: bool) -> Counts:
    """Return the numbers of sources and targets of a reduction, and its divisor."""
    first_target = 0 if in_place else num_sources
    divisor = num_sources if op is ReduceOp.MEAN else 1
    return Counts(num_sources, num_arrays - first_target, first_target, divisor)


def move(work_stream: DeviceStream, groups: Groups) -> None:
    """Copy the first array of each group to its other arrays, bitwise, whatever the dtype.

    The copy is a sum of one source, over integers as wide as all addresses and strides allow.
    """
    common_bits = 0
    for arrays in groups:
        for array in arrays:
            common_bits |= checks.address(array) | array.itemsize
            for extent, stride in zip(array.shape, array.strides, strict=True):
                common_bits |= stride if extent > 1 else 0
    width = min(8, common_bits & -common_bits) if common_bits else 8
    combine(work_stream, ReduceOp.SUM, np.dtype(f"i{width}"), groups, 1)


def run(
    work_stream: DeviceStream,
    kernel: Kernel,
    code: int,
    groups: Groups,
    counts: Counts,
    num_reads: int,
    numbers: Sequence[float] = (),
) -> None:
    """Run a kernel over groups of arrays of one dtype, in one launch.

    The first ``num_reads`` arrays of a group are read, those from ``counts.first_target`` on are
    written. ``numbers`` are further arguments of the kernel.
    """
    filled = [[*arrays] for arrays in groups if arrays[0].size]
    if not filled:
        return
    copied_back: list[tuple[HostArray, HostArray]] = []
    allocations = []  # of the staging copies, kept until all work on them is enqueued
    for arrays in filled:
        for k, array in enumerate(arrays):
            if _is_aligned(array, arithmetic.number_nbytes(code)):
                continue
            allocation, staging = cuda_arrays.allocate(work_stream, array.shape, array.dtype)
            allocations.append(allocation)
            if k < num_reads:
                move(work_stream, [[array, staging]])
            if k >= counts.first_target:
                copied_back.append((staging, array))
            arrays[k] = staging
    size = arithmetic.dtype_of(code).itemsize
    items = [item for arrays in filled for item in _items(arrays, size)]
    num_resident = launcher.num_resident(kernel, work_stream.device)
    blocks, words = lay_out(items, counts, kernel.launch_bounds[0], num_resident, numbers)
    launcher.launch(kernel, work_stream.device, blocks, words, work_stream.stream)
    for staging, array in copied_back:
        move(work_stream, [[staging, array]])


def lay_out(
    items: Sequence[Item],
    counts: Counts,
    threads: int,
    num_resident: int,
    numbers: Sequence[float] = (),
) -> tuple[int, list[int]]:
    """Return the number of blocks of a launch and the words of its table.

    Of its blocks, ``num_resident`` run at once.
    """
    # Pieces of four vectors per thread, eight loads in flight, if they occupy half of the blocks
    # that run at once; of one vector, two to four loads, if more blocks have more in flight.
    total = sum(-(-item.units // (_PER_THREAD * threads)) for item in items)
    per_thread = _PER_THREAD if 2 * total >= num_resident else 1
    heads: list[int] = []
    records: list[int] = []
    first_record = len(TableHeader._fields) + len(ItemHead._fields) * len(items)
    num_pieces = 0
    for axes, before, units, after, addresses in items:
        heads += ItemHead(num_pieces, first_record + len(records))
        num_pieces += max(1, -(-units // (per_thread * threads)))
        is_alike = all(len({*strides}) == 1 for _, strides in axes)
        records += (*ItemRecord(len(axes), before, units, after, int(is_alike)), *addresses)
        for extent, strides in axes:
            records += (extent, *strides)
    header = TableHeader(
        num_pieces,
        len(items),
        *counts,
        per_thread=per_thread,
        width=len(items[0].addresses),
        numbers=first_record + len(records),
    )
    float64s = np.array(numbers, np.float64).view(np.int64).tolist()
    return min(num_pieces, _WAVES * num_resident), [*header, *heads, *records, *float64s]


def _is_aligned(array: HostArray, size: int) -> bool:
    """Return whether all elements lie at multiples of ``size``, as accesses of a GPU must."""
    if checks.address(array) % size:
        return False
    return all(
        stride % size == 0
        for extent, stride in zip(array.shape, array.strides, strict=True)
        if extent > 1
    )


def _items(arrays: Sequence[HostArray], size: int) -> list[Item]:
    """Return the items of a group; ``size`` is the itemsize of the kernel's element type."""
    axes = _merged(arrays, size)
    addresses = [*map(checks.address, arrays)]
    is_dense = not axes or (len(axes) == 1 and {*axes[0][1]} == {size})
    misalignments = {address % _VECTOR for address in addresses}
    if is_dense and len(misalignments) == 1:
        count = axes[0][0] if axes else 1
        (misalignment,) = misalignments
        before = min(count, -misalignment % _VECTOR // size)
        num_vectors, after = divmod(count - before, _VECTOR // size)
        if -misalignment % size == 0:
            return [Item((), before, num_vectors, after, addresses)]
    if not axes:
        axes = [(1, (size,) * len(arrays))]
    return [*_cut(axes, addresses)]


def _cut(axes: list[tuple[int, tuple[int, ...]]], addresses: list[int]) -> list[Item]:
    """Return items of at most ``_LONGEST`` elements, cut along the outermost axis."""
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


def _merged(arrays: Sequence[HostArray], size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (extent, stride in each array) of the coalesced axes, the innermost first.

    Extents count elements of ``size`` bytes; an element of the arrays may consist of several.
    """
    parts = arrays[0].itemsize // size
    found = [(parts, (size,) * len(arrays))] if parts > 1 else []
    for extent, strides in reversed(array_strides.merge_axes(arrays)):
        if found and strides == tuple(found[-1][0] * stride for stride in found[-1][1]):
            found[-1] = (found[-1][0] * extent, found[-1][1])
        else:
            found.append((extent, strides))
    return found
