"""All-reduce of buffers on several GPUs of this process: each rank's part, on its own stream.

A rank's stream orders the call: it comes there after what made the buffer, and when it has ended
there, the result is complete and no other rank uses the buffer any more. The host waits for
nothing, but at the first call of some devices: memory is set up then, and kernels are compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda, cuda_arrays, driver
from dvkernels.errors import DeviceError
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels.cuda.engine import job as jobs
from dvkernels.kernels.cuda.engine.call import AllReduce, wait_for
from dvkernels.kernels.cuda.engine.job import Order
from dvkernels.kernels.cuda.multi_gpu import peer_access
from dvkernels.kernels.cuda.multi_gpu.group import AllReduceCall, DeviceGroup
from dvkernels.reduce_op import Reduction, is_half
from dvkernels.schedules import flag_selection
from dvkernels.schedules.flag_selection import AccessMatrix

__all__ = ["abort", "all_reduce", "recover"]

Array = np.ndarray[Any, Any]


class Rank(NamedTuple):
    """Where a rank works, and the arrays that it brings and that its result goes to."""

    order: Order
    read: Array
    write: Array  # the same array where it works in place
    others: tuple[Order, ...]  # other streams of the same device that use the arrays


class _OpenGroup(NamedTuple):
    team: DeviceGroup
    reach: AccessMatrix


_groups: dict[tuple[int, ...], _OpenGroup] = {}
_grouping = threading.RLock()


def all_reduce(call: AllReduce, algorithm: str) -> list[Any]:
    """Leave the reduction in every buffer of a call, or in its ``out``, or in new arrays.

    Arrays that are not dense, or lie where a GPU cannot read their elements, are copied to the side
    and back: a launch or two more, and their memory once more.

    Raises
    ------
    CollectiveTimeoutError
        An earlier call on these devices failed. No buffer has been touched.
    """
    ranks = _ranks(call, call.written())
    if ranks[0].read.size:
        found = driver.find()
        assert found is not None  # it has told where the buffers lie
        for rank in ranks:
            for other in rank.others:
                wait_for(rank.order, other)
        _launch(found, call.op, ranks, algorithm)
        for rank in ranks:
            for other in rank.others:
                wait_for(other, rank.order)
    return list(call.results)


def _ranks(call: AllReduce, writes: Sequence[Array]) -> list[Rank]:
    """Return where each rank works; raise unless its result goes to the GPU of its buffer."""
    places = call.places()
    count = len(writes)
    ranks = []
    for k, (place, write) in enumerate(zip(places[:count], writes, strict=True)):
        others = []
        if len(places) > count:
            there = places[count + k]
            if there.device != place.device:
                raise DeviceError(
                    f"{call.verb} leaves each result on the GPU of its buffer: replica {k} is on "
                    f"cuda:{place.device}, out {k} on cuda:{there.device}; allocate it there"
                )
            others = [Order(there.device, there.stream)] if there.stream != place.stream else []
        ranks.append(Rank(Order(place.device, place.stream), place.array, write, tuple(others)))
    return ranks


def _launch(found: driver.Driver, op: Reduction, ranks: Sequence[Rank], algorithm: str) -> None:
    devices = tuple(rank.order.device for rank in ranks)
    group = _group(found, devices)
    dtype, length = ranks[0].read.dtype, ranks[0].read.size
    alignment = arithmetic.number_nbytes(arithmetic.type_code(dtype))
    # Stand-ins are kept until all work that uses them has its place on the stream.
    kept: list[Any] = []
    dense = [_dense(rank, alignment, kept) for rank in ranks]
    inputs = [checks.address(rank.read) for rank in dense]
    outputs = [checks.address(rank.write) for rank in dense]
    captured = [rank for rank in ranks if found.is_capturing(*rank.order)]
    route = flag_selection.choose(
        group.reach,
        devices,
        ranks[0].read.nbytes,
        algorithm,
        is_half=is_half(dtype),
        buffers_reachable=all(found.is_open(address) for address in {*inputs, *outputs}),
        is_captured=bool(captured),
    )
    job = AllReduceCall(inputs, outputs, length, dtype, op, [rank.order.stream for rank in ranks])
    # A graph takes in the streams that wait for the one that it is captured from.
    for rank in ranks if captured else ():
        if rank is not captured[0]:
            wait_for(rank.order, captured[0].order)
    group.team.all_reduce(job, route, is_captured=bool(captured))
    for rank in ranks if captured else ():
        if rank is not captured[0]:
            wait_for(captured[0].order, rank.order)
    for rank, stand_in in zip(ranks, dense, strict=True):
        if stand_in.write is not rank.write:
            jobs.move(rank.order, [[stand_in.write, rank.write]])


def recover() -> None:
    """Begin anew after a ``CollectiveTimeoutError``: wait for the GPUs that it is about, and reset.

    What they were still given ends first, at the latest when its own waiting ends. Buffers of the
    calls that failed hold nothing of use.
    """
    for group in [*_groups.values()]:
        group.team.recover()


def abort() -> None:
    """End all waiting between GPUs now; the calls it was for, and later ones, fail."""
    for group in [*_groups.values()]:
        group.team.abort()


def _group(found: driver.Driver, devices: tuple[int, ...]) -> _OpenGroup:
    """Return the team of these devices: one for each list of them, as long as the process lives."""
    try:
        _grouping.acquire()
        if devices not in _groups:
            reach = peer_access.reach(found, devices)
            _groups[devices] = _OpenGroup(
                DeviceGroup(devices, peer_access.PeerAccess(found)), reach
            )
        return _groups[devices]
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            _grouping.release()
        except RuntimeError:  # not ours: the wait was interrupted
            pass


def _dense(rank: Rank, alignment: int, kept: list[Any]) -> Rank:
    """Return the rank with dense arrays in place of those that are not."""
    device, stream = rank.order

    def stand_in(array: Array) -> Array:
        if array.flags.c_contiguous and checks.address(array) % alignment == 0:
            return array
        kept.append(cuda.arrays().empty(device, array.shape, array.dtype, stream))
        return cuda_arrays.place("staging", kept[-1:])[0].array

    read = stand_in(rank.read)
    if read is not rank.read:
        jobs.move(rank.order, [[rank.read, read]])
    write = read if rank.write is rank.read else stand_in(rank.write)
    return rank._replace(read=read, write=write)
