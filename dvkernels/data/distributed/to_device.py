"""Double-buffered copies of batches to the GPUs of their replicas, while the GPUs still compute.

The parts for one GPU are packed into page-locked memory, transferred in one copy on a separate copy
stream, and then copied within the GPU into new memory of the current stream, which takes a few
hundredths of the time of the transfer. So a batch is transferred while the step before it computes,
and the result belongs to the caller's stream: the caller may keep, drop and reuse it at any time.
Two slots alternate, each with a reused staging buffer on the host and one on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.data.array_nest import Element
from dvkernels.devices import array_memory, cuda, interop
from dvkernels.devices.array_spec import HostArray, spec
from dvkernels.devices.device import Device
from dvkernels.devices.gpu_times import GpuSpan
from dvkernels.profiler import tracing
from dvkernels.profiler.memory_report import Holding
from dvkernels.values.distributed import PerReplica, with_global_array
from dvkernels.values.placement import Placement

__all__: list[str] = []

_ALIGNMENT = 256  # bytes, as CUDA allocates
_NUM_SLOTS = 2


class _SlotRange(NamedTuple):
    """Byte range of one part in a slot."""

    column: int
    row: int
    begin: int
    array: HostArray


class _Slot:
    """Staging buffers of one batch on host and device, and the events that guard their reuse."""

    def __init__(self, arrays: cuda.ArrayLibrary, device: int) -> None:
        self.arrays, self.device = arrays, device
        self.capacity = 0
        self.host_buffer: HostArray = np.empty(0, np.uint8)
        self.device_buffer: Any = None  # an array of the GPU's library
        self.uploaded = arrays.event(device)  # the host buffer may be overwritten
        self.emptied = arrays.event(device)  # the device buffer may be overwritten

    def reserve(self, nbytes: int) -> None:
        """Wait until the host buffer is free; grow both buffers if they are too small."""
        if self.capacity:
            self.uploaded.synchronize()
        if nbytes <= self.capacity:
            return
        if self.capacity:
            self.emptied.synchronize()
        self.host_buffer = self.arrays.pinned(nbytes)
        self.device_buffer = self.arrays.empty(self.device, (nbytes,), np.dtype(np.uint8))
        places = "cpu:0", f"cuda:{self.device}"
        self._holdings = [Holding(place, "staging", nbytes) for place in places]
        # The allocator may reuse memory that work on the current stream still accesses.
        self.emptied.record(self.arrays.current(self.device))
        self.capacity = nbytes


class DeviceCopier:
    """Copier of host arrays to the GPUs of the replicas.

    Parameters
    ----------
    devices : sequence of Device
        The device of each replica.
    arrays : ArrayLibrary, optional
        Makes arrays, streams and events; by default the library of this process.
    """

    def __init__(self, devices: Sequence[Device], arrays: cuda.ArrayLibrary | None = None) -> None:
        self._devices = [device.index for device in devices]
        self._arrays = arrays or cuda.arrays()
        self._slots: dict[int, list[_Slot]] = {}
        self._streams: dict[int, Any] = {}
        self._num_batches = 0

    def copy(self, columns: Sequence[Sequence[Element]]) -> list[list[Element]]:
        """Return the columns with each array copied to the device of its replica.

        A column is one leaf: one array per replica, of any shape and dtype. Values other than
        numeric arrays stay as they are. The current streams wait for the copies; the host waits
        until the batch before the last has been transferred.
        """
        copied = [list(column) for column in columns]
        for device in dict.fromkeys(self._devices):
            ranges = [*self._slot_ranges(columns, device)]
            if ranges:
                with self._arrays.at(device):  # whose default stream may be the current one
                    self._copy_to(device, ranges, copied)
        self._num_batches += 1
        return copied

    def _slot_ranges(
        self, columns: Sequence[Sequence[Element]], device: int
    ) -> Iterator[_SlotRange]:
        begin = 0
        for k, column in enumerate(columns):
            for rank, value in enumerate(column):
                if self._devices[rank] != device or not _is_numeric(value):
                    continue
                array = np.asarray(value)
                yield _SlotRange(k, rank, begin, array)
                begin += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _copy_to(self, device: int, ranges: list[_SlotRange], copied: list[list[Element]]) -> None:
        arrays = self._arrays
        if device not in self._slots:
            # The slots are set last: after an interrupt before that, both are made again.
            self._streams[device] = arrays.stream(device)
            self._slots[device] = [_Slot(arrays, device) for _ in range(_NUM_SLOTS)]
        slot, copy_stream = (
            self._slots[device][self._num_batches % _NUM_SLOTS],
            self._streams[device],
        )
        last = ranges[-1]
        nbytes = max(1, last.begin + last.array.nbytes)
        slot.reserve(nbytes)
        for _, _, begin, array in ranges:
            staging = slot.host_buffer[begin : begin + array.nbytes]
            staging.view(array.dtype).reshape(array.shape)[...] = array
        copy_stream.wait_event(slot.emptied)
        recording = tracing.active
        span = None if recording is None else GpuSpan(recording, device, copy_stream.ptr)
        arrays.copy(slot.device_buffer[:nbytes], slot.host_buffer[:nbytes], copy_stream)
        if span is not None:
            span.end("copy", "copy", {"from": "host", "to": f"cuda:{device}", "bytes": nbytes})
        slot.uploaded.record(copy_stream)
        current_stream = arrays.current(device)
        current_stream.wait_event(slot.uploaded)
        packed = arrays.empty(device, (nbytes,), np.dtype(np.uint8))
        arrays.copy(packed, slot.device_buffer[:nbytes])
        slot.emptied.record(current_stream)
        for column, row, begin, array in ranges:
            part = packed[begin : begin + array.nbytes]
            copied[column][row] = part.view(array.dtype).reshape(array.shape)


class JaxCopier:
    """Copier of host arrays to the JAX devices of the replicas; JAX overlaps the copies itself.

    Like JAX it makes 32 bits of 64, unless ``jax_enable_x64`` is set.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._memory = array_memory.of(devices)

    def copy(self, columns: Sequence[Sequence[Element]]) -> list[list[Element]]:
        """Return the columns with each numeric array copied to the device of its replica."""
        return [
            [
                self._memory.new(value, device) if _is_numeric(value) else value
                for value, device in zip(column, self._devices, strict=True)
            ]
            for column in columns
        ]

    @staticmethod
    def assemble(value: PerReplica[Any], owner: Placement) -> None:
        """Give a value its global array, which else each step would make.

        Its parts must be alike, and lie on their own devices: those of the dataset stay where they
        are.
        """
        from dvkernels.communicators.jax import shard_map

        parts = value.values
        if not all(map(interop.is_of_jax, parts)) or len({*map(spec, parts)}) > 1:
            return
        if all(
            part.committed and part.devices() == {own}
            for part, own in zip(parts, owner.jax_local_devices, strict=True)
        ):
            with_global_array(value, shard_map.assembled(value.values, owner.mesh))


BatchCopier = DeviceCopier | JaxCopier


def copier_to(devices: Sequence[Device]) -> BatchCopier | None:
    """Return a copier to the devices of the replicas; None if they are CPU devices."""
    if devices[0].kind == "cuda":
        return DeviceCopier(devices)
    return JaxCopier(devices) if devices[0].kind.startswith("jax:") else None


def _is_numeric(value: Any) -> bool:
    is_array = isinstance(value, (np.ndarray, np.generic))
    return is_array and reduce_op.kind(value.dtype) in "biufc"
