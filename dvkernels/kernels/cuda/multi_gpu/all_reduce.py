"""All-reduce of buffers on several GPUs of this process: one launch per rank, on its own stream.

On a rank's stream, the launch comes after the work that made the buffer; when the launch has ended,
the result is complete and no other rank accesses the buffer. The host waits only in the first call
on a list of devices, which allocates memory and compiles kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from dvkernels.devices import cuda_arrays, driver
from dvkernels.devices.array_spec import HostArray
from dvkernels.devices.cuda_arrays import order_streams
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.errors import DeviceError
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels.cuda.engine import job as jobs
from dvkernels.kernels.cuda.engine.call import AllReduce
from dvkernels.kernels.cuda.multi_gpu import peer_access
from dvkernels.kernels.cuda.multi_gpu.group import AllReduceCall, DeviceGroup
from dvkernels.reduce_op import Reduction, is_half
from dvkernels.schedules import flag_selection
from dvkernels.schedules.flag_selection import AccessMatrix

__all__ = ["abort", "all_reduce", "recover"]


class Rank(NamedTuple):
    """Stream of a rank, the array that it contributes, and the array for its result."""

    work_stream: DeviceStream
    read: HostArray
    write: HostArray  # the same array where it works in place
    out_stream: DeviceStream  # of the array for its result, on the same device


class _OpenGroup(NamedTuple):
    group: DeviceGroup
    reach: AccessMatrix


_groups: dict[tuple[int, ...], _OpenGroup] = {}
_grouping = threading.RLock()


def all_reduce(call: AllReduce, algorithm: str) -> list[Any]:
    """Leave the reduction in every buffer of a call, or in its ``out``, or in new arrays.

    Arrays that are not contiguous or not aligned to their elements are copied to a staging buffer
    and back: one or two launches more, and their memory once more.

    Raises
    ------
    CollectiveTimeoutError
        An earlier call on these devices failed. No buffer has been touched.
    """
    ranks = _ranks(call, call.targets())
    if ranks[0].read.size:
        cuda_driver = driver.find()
        assert cuda_driver is not None  # it has located the buffers
        streams = [stream for rank in ranks for stream in (rank.work_stream, rank.out_stream)]
        with cuda_arrays.in_one_capture(call.verb, streams) as is_captured:
            order_streams([(rank.work_stream, rank.out_stream) for rank in ranks])
            _launch(cuda_driver, call.op, ranks, algorithm, is_captured)
            order_streams([(rank.out_stream, rank.work_stream) for rank in ranks])
        call.settle([rank.work_stream for rank in ranks])
    return list(call.results)


def _ranks(call: AllReduce, writes: Sequence[HostArray]) -> list[Rank]:
    """Return the ranks of a call; raise unless each result lies on the GPU of its buffer."""
    buffers = call.device_buffers()
    num_ranks = len(writes)
    outs = buffers[num_ranks:] or buffers
    ranks = []
    for k, (buffer, out, write) in enumerate(zip(buffers[:num_ranks], outs, writes, strict=True)):
        if out.device != buffer.device:
            raise DeviceError(
                f"{call.verb} leaves each result on the GPU of its buffer: replica {k} is on "
                f"cuda:{buffer.device}, out {k} on cuda:{out.device}; allocate it there"
            )
        ranks.append(Rank(buffer.device_stream, buffer.array, write, out.device_stream))
    return ranks


def _launch(
    cuda_driver: driver.Driver,
    op: Reduction,
    ranks: Sequence[Rank],
    algorithm: str,
    is_captured: bool,
) -> None:
    devices = tuple(rank.work_stream.device for rank in ranks)
    open_group = _group(cuda_driver, devices)
    dtype, length = ranks[0].read.dtype, ranks[0].read.size
    alignment = arithmetic.number_nbytes(arithmetic.type_code(dtype))
    # Staging buffers are kept until all work on them is enqueued.
    allocations: list[Any] = []
    contiguous = [_contiguous(rank, alignment, allocations) for rank in ranks]
    inputs = [checks.address(rank.read) for rank in contiguous]
    outputs = [checks.address(rank.write) for rank in contiguous]
    route = flag_selection.choose(
        open_group.reach,
        devices,
        ranks[0].read.nbytes,
        algorithm,
        is_half=is_half(dtype),
        buffers_reachable=all(cuda_driver.is_open(address) for address in {*inputs, *outputs}),
        is_captured=is_captured,
        launches_block=driver.launches_block(),
    )
    job = AllReduceCall(
        inputs, outputs, length, dtype, op, [rank.work_stream.stream for rank in ranks]
    )
    open_group.group.all_reduce(job, route, is_captured=is_captured)
    for rank, staging in zip(ranks, contiguous, strict=True):
        if staging.write is not rank.write:
            jobs.move(rank.work_stream, [[staging.write, rank.write]])


def recover() -> None:
    """Recover from a ``CollectiveTimeoutError``: wait for its GPUs, and reset their groups.

    Launches that are still pending end first, at the latest at their own deadline. The buffers of
    the failed calls have undefined contents.
    """
    for open_group in [*_groups.values()]:
        open_group.group.recover()


def abort() -> None:
    """Abort all waits between GPUs now; the calls that wait, and later calls, fail."""
    for open_group in [*_groups.values()]:
        open_group.group.abort()


def _group(cuda_driver: driver.Driver, devices: tuple[int, ...]) -> _OpenGroup:
    """Return the group of these devices, made once per list and kept as long as the process."""
    try:
        _grouping.acquire()
        if devices not in _groups:
            reach = peer_access.reach(cuda_driver, devices)
            _groups[devices] = _OpenGroup(
                DeviceGroup(devices, peer_access.PeerAccess(cuda_driver)), reach
            )
        return _groups[devices]
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            _grouping.release()
        except RuntimeError:  # not acquired: the wait was interrupted
            pass


def _contiguous(rank: Rank, alignment: int, allocations: list[Any]) -> Rank:
    """Return the rank with staging buffers in place of arrays that are not contiguous."""

    def staged(array: HostArray) -> HostArray:
        if array.flags.c_contiguous and checks.address(array) % alignment == 0:
            return array
        made, staging = cuda_arrays.allocate(rank.work_stream, array.shape, array.dtype)
        allocations.append(made)
        return staging

    read = staged(rank.read)
    if read is not rank.read:
        jobs.move(rank.work_stream, [[rank.read, read]])
    write = read if rank.write is rank.read else staged(rank.write)
    return rank._replace(read=read, write=write)
