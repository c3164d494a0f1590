"""Carries the parts of batches to the GPUs of their replicas, while these still compute.

The parts for one GPU are laid out side by side in page-locked memory, cross in one copy on a stream
of their own, and are then copied, within the GPU, into new memory of the stream that is current:
some hundredths of the time that the crossing takes. So a batch crosses while the step before it
computes, and what the caller gets belongs to the caller's stream: it may be kept, dropped and
reused at any time. Two slots take turns, each of memory on both sides that is used again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.devices import cuda
from dvkernels.devices.base import Device

__all__ = ["DeviceCopier"]

_ALIGNMENT = 256  # bytes, as CUDA allocates
_NUM_SLOTS = 2


class _SlotRange(NamedTuple):
    """Where a part lies in a slot."""

    column: int
    row: int
    begin: int
    array: Any


class _Slot:
    """Memory of one batch on both sides, and the events that say when it is free."""

    def __init__(self, arrays: cuda.ArrayLibrary, device: int) -> None:
        self.arrays, self.device = arrays, device
        self.capacity = 0
        self.host: Any = None
        self.there: Any = None
        self.uploaded = arrays.event(device)  # the host's side may be written
        self.emptied = arrays.event(device)  # the device's side may be

    def make_room(self, nbytes: int) -> None:
        """Wait until the host's side is free; grow both sides if they are too small."""
        if self.capacity:
            self.uploaded.synchronize()
        if nbytes <= self.capacity:
            return
        if self.capacity:
            self.emptied.synchronize()
        self.host = self.arrays.pinned(nbytes)
        self.there = self.arrays.empty(self.device, (nbytes,), np.dtype(np.uint8))
        # That memory may have been another's, whose work is on the stream that it came from.
        self.emptied.record(self.arrays.current(self.device))
        self.capacity = nbytes


class DeviceCopier:
    """Makes arrays on GPUs of arrays of the host.

    Parameters
    ----------
    devices : sequence of Device
        Of each replica.
    arrays : ArrayLibrary, optional
        What makes arrays, streams and events; that of this process if not given.
    """

    def __init__(self, devices: Sequence[Device], arrays: cuda.ArrayLibrary | None = None) -> None:
        self._devices = [device.index for device in devices]
        self._arrays = arrays or cuda.arrays()
        self._slots: dict[int, list[_Slot]] = {}
        self._streams: dict[int, Any] = {}
        self._turn = 0

    def carry(self, columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return columns of arrays, one per replica, each on the device of its replica.

        What is no array of numbers stays as it is. The current streams wait for the arrays; the
        host waits for the batch before the last to have crossed.
        """
        carried = [list(column) for column in columns]
        for device in dict.fromkeys(self._devices):
            places = [*self._places(columns, device)]
            if places:
                self._carry_to(device, places, carried)
        self._turn += 1
        return carried

    def _places(self, columns: Sequence[Sequence[Any]], device: int) -> Iterator[_SlotRange]:
        begin = 0
        for k, column in enumerate(columns):
            for rank, value in enumerate(column):
                if self._devices[rank] != device or not _is_numeric(value):
                    continue
                array = np.asarray(value)
                yield _SlotRange(k, rank, begin, array)
                begin += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _carry_to(self, device: int, places: list[_SlotRange], carried: list[list[Any]]) -> None:
        arrays = self._arrays
        if device not in self._slots:
            # The slots last: an interrupt before they are there has them made again.
            self._streams[device] = arrays.stream(device)
            self._slots[device] = [_Slot(arrays, device) for _ in range(_NUM_SLOTS)]
        slot, side = self._slots[device][self._turn % _NUM_SLOTS], self._streams[device]
        last = places[-1]
        nbytes = max(1, last.begin + last.array.nbytes)
        slot.make_room(nbytes)
        for _, _, begin, array in places:
            room = slot.host[begin : begin + array.nbytes]
            room.view(array.dtype).reshape(array.shape)[...] = array
        side.wait_event(slot.emptied)
        arrays.copy(slot.there[:nbytes], slot.host[:nbytes], side)
        slot.uploaded.record(side)
        here = arrays.current(device)
        here.wait_event(slot.uploaded)
        own = arrays.empty(device, (nbytes,), np.dtype(np.uint8))
        arrays.copy(own, slot.there[:nbytes])
        slot.emptied.record(here)
        for column, row, begin, array in places:
            part = own[begin : begin + array.nbytes]
            carried[column][row] = part.view(array.dtype).reshape(array.shape)


def _is_numeric(value: Any) -> bool:
    is_array = isinstance(value, (np.ndarray, np.generic))
    return is_array and reduce_op.kind(value.dtype) in "biufc"
