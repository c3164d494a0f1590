"""Group of ranks on the devices of one process, with their flags, slots and programs.

Each rank has flags and slots in the memory of its device, and the programs of the protocols that it
has run. In pinned host memory, which all devices access, lie the stop word and, for each pair of
ranks, the epoch in which the first waited in vain for the second.

One thread launches for all ranks, and in the process one call at a time, whatever its group. Before
the first launch of a call, its kernels are compiled and loaded and its programs written on every
device: loading and allocating may wait for a device, and that device may be waiting, in a launch,
for the next launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import catalogue, launcher, operations
from dvkernels.kernels.cuda.engine.kernel import Kernel
from dvkernels.kernels.cuda.multi_gpu import flag_program
from dvkernels.kernels.cuda.multi_gpu.peer_access import DeviceMemory, PeerAccess
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.schedules.flag_protocol import NUM_SLOTS, Combine, Protocol, Signal
from dvkernels.schedules.flag_selection import Route

__all__ = ["MOST_BLOCKS", "AllReduceCall", "DeviceGroup"]

MOST_BLOCKS = 32
# Bytes per block below which fewer blocks are launched; not measured on hardware.
_BLOCK_NBYTES = 16 * 1024
_SLOT_NBYTES = 4 * 1024 * 1024
_ABORTED = 2  # value of the stop word after abort(); a rank sets 1 at its deadline


class AllReduceCall(NamedTuple):
    """Arguments of an all-reduce over contiguous buffers of one length, one per rank."""

    inputs: Sequence[int]  # addresses
    outputs: Sequence[int]  # equal to the inputs in place
    length: int
    dtype: np.dtype[Any]
    op: Reduction
    streams: Sequence[Any]


class DeviceGroup:
    """Group of ranks that reduce by the protocols of schedules/flag_all_reduce.py.

    The calls of a group are ordered: on each rank, a call comes after the previous one, also where
    it has another stream. Within a launch, a rank waits ``timeout_seconds`` for another before all
    ranks give up. After that, or ``abort``, results are undefined, and every call and ``check``
    raise ``CollectiveTimeoutError`` until ``recover``.
    """

    def __init__(
        self, devices: Sequence[int], driver: PeerAccess, *, timeout_seconds: float = 600.0
    ) -> None:
        self._devices, self._driver = tuple(devices), driver
        self._deadline_ns = round(timeout_seconds * 1e9)
        self._timeout_seconds = timeout_seconds
        num_ranks = len(self._devices)
        self._shared = driver.pinned(self._devices[0], 1 + num_ranks**2)
        unset = [0] * (flag_program.flags_nbytes(num_ranks) // 8 * MOST_BLOCKS)
        self._flags = [driver.words(device, unset) for device in self._devices]
        self._slots: dict[str, list[list[int]]] = {}
        self._programs: dict[tuple[str, tuple[int, ...]], list[DeviceMemory]] = {}
        self._most_blocks: dict[Kernel, int] = {}  # of the kernels that are loaded
        self._allocations: list[Any] = []
        # Per rank, after its last call. Its stream may have been destroyed since.
        self._ends = [driver.event(device) for device in self._devices]
        self._epoch = 0
        self._num_calls = 0

    def all_reduce(self, job: AllReduceCall, route: Route, *, is_captured: bool = False) -> None:
        """Launch an all-reduce; return before it has run.

        A captured call is not ordered with other calls: the launches of the graph order it.

        Raises
        ------
        CollectiveTimeoutError
            An earlier call failed; nothing has been launched.
        """
        schedule = route.make(len(self._devices))
        operation, code = operations.resolve(job.op, job.dtype)
        make = catalogue.waiting if route.waits else catalogue.row
        kernel = make(operation, code)
        itemsize = arithmetic.dtype_of(code).itemsize
        count = job.length * arithmetic.factor(job.op, job.dtype)
        try:
            launcher.launching.acquire()
            self.check()
            most_blocks = self._load(kernel)
            programs = self._ready_programs(schedule, route.order)
            slots = self._ready_slots(route) if schedule.uses_slots else None
            lanes = [*zip(self._devices, job.streams, self._ends, strict=True)]
            if not is_captured:
                self._driver.wait(lanes)
            longest = _SLOT_NBYTES // itemsize if slots else max(1, count)
            try:
                for begin in range(0, count, longest):
                    length = min(longest, count - begin)
                    addresses = self._buffer_addresses(job, route.order, begin * itemsize, slots)
                    self._launch(
                        _LaunchedCall(
                            schedule,
                            route,
                            kernel,
                            most_blocks,
                            programs,
                            addresses,
                            job,
                            length,
                            itemsize,
                        )
                    )
                if not is_captured:
                    self._driver.record(lanes)
            except BaseException:
                self._most_blocks.pop(kernel, None)  # a failed launch may have unloaded it
                if not is_captured:
                    # Launched ranks wait for the others, and no later call would wait for them.
                    self.abort()
                raise
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                launcher.launching.release()
            except RuntimeError:  # not acquired: the wait was interrupted
                pass

    def _launch(self, call: _LaunchedCall) -> None:
        """Launch the kernels of a call: one per rank, or one per row, ordered by events."""
        order, streams = call.route.order, call.job.streams
        divisor = len(order) if call.job.op is ReduceOp.MEAN else 1
        nbytes = call.length * call.itemsize // call.schedule.num_parts
        num_blocks = max(1, min(call.most_blocks, nbytes // _BLOCK_NBYTES))
        num_parts = call.schedule.num_parts
        share = flag_program.shares(call.length, call.itemsize, num_parts, num_blocks)
        epoch = self._epoch
        if call.route.waits:  # a call that is left half-way has used its epochs too
            self._epoch += call.schedule.num_stages

        def launch(position: int, row: int) -> None:
            header = flag_program.LaunchHeader(
                call.programs[position].address,
                epoch,
                call.length,
                divisor,
                self._deadline_ns,
                row,
                *share,
            )
            rank = order[position]
            device, stream = self._devices[rank], streams[rank]
            words = [*header, *call.addresses]
            self._driver.launch(device, call.kernel, num_blocks, stream, words)

        if call.route.waits:
            for position in range(len(order)):
                launch(position, 0)
        else:
            signals: dict[tuple[int, int], Any] = {}  # (writer, reader) -> event of the last signal
            for position, number in call.schedule.in_order():
                row, rank = call.schedule.rows[position][number], order[position]
                device, stream = self._devices[rank], streams[rank]
                if isinstance(row, Combine):
                    launch(position, number)
                elif isinstance(row, Signal):
                    event = self._driver.event(device)
                    self._driver.record([(device, stream, event)])
                    signals.update({(position, peer): event for peer in row.ranks})
                else:
                    events = [signals[peer, position] for peer in row.ranks]
                    self._driver.wait([(device, stream, event) for event in events])
        self._num_calls += 1

    def check(self) -> None:
        """Raise ``CollectiveTimeoutError`` if a call that has run by now has failed."""
        if self._shared[0] == 0:
            return
        num_ranks = len(self._devices)
        missed = self._shared[1:].reshape(num_ranks, num_ranks) != 0
        # A rank that waits has been launched; a rank that is only waited for has not.
        absent = np.flatnonzero(missed.any(0) & ~missed.any(1))
        waits = "; ".join(
            f"rank {rank} waited for {self._describe_ranks(np.flatnonzero(missed[rank]))}"
            for rank in np.flatnonzero(missed.any(1))
        )
        if self._shared[0] == _ABORTED:
            reason = "it was aborted"
        elif absent.size:
            reason = f"{self._describe_ranks(absent)} did not come within {self._timeout_seconds} s"
        else:
            reason = f"it took more than {self._timeout_seconds} s"
        raise CollectiveTimeoutError(
            f"an all-reduce between devices did not end: {reason} ({waits or 'no rank waited'}); "
            "its results, and those of later calls, are undefined; remove the cause, then call "
            "kernels.cuda.recover()"
        )

    def _describe_ranks(self, ranks: Iterable[int]) -> str:
        return ", ".join(f"rank {rank} (cuda:{self._devices[rank]})" for rank in ranks)

    def abort(self) -> None:
        """Abort all waits on all devices: launched calls exit at once."""
        self._shared[0] = _ABORTED

    def recover(self) -> None:
        """Reset the group after a failure; wait for all devices first."""
        try:
            launcher.launching.acquire()
            for device in self._devices:
                self._driver.synchronize(device)
            # The flags are at most at the last epoch of the failed call, or of the calls launched
            # after it; the epochs of new calls are above these.
            self._shared[:] = 0
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                launcher.launching.release()
            except RuntimeError:  # not acquired: the wait was interrupted
                pass

    # -- resources of a call ----------------------------------------------------------------------

    def _load(self, kernel: Kernel) -> int:
        """Load a kernel on all devices; return the most blocks of a launch.

        All of them run at once on every device, where no other work takes their place.
        """
        if kernel not in self._most_blocks:
            devices = dict.fromkeys(self._devices)
            resident = [self._driver.load(device, kernel) for device in devices]
            self._most_blocks[kernel] = min(MOST_BLOCKS, *resident)
        return self._most_blocks[kernel]

    def _ready_programs(self, schedule: Protocol, order: tuple[int, ...]) -> list[DeviceMemory]:
        """Return the program of each position in the protocol, on the device of its rank."""
        key = schedule.name, order
        if key not in self._programs:
            flags = [self._flags[rank].address for rank in order]
            stop = _address(self._shared)
            programs = []
            for position, rank in enumerate(order):
                missed = [stop + 8 * (1 + rank * len(order) + peer) for peer in order]
                words = flag_program.program_words(
                    schedule, position, flag_program.SharedAddresses(flags, missed, stop)
                )
                programs.append(self._driver.words(self._devices[rank], words))
            self._programs[key] = programs
        return self._programs[key]

    def _ready_slots(self, route: Route) -> list[list[int]]:
        """Return the addresses of the slots of all ranks, for even calls and for odd calls."""
        memory_kind = route.slots
        if memory_kind not in self._slots:
            slots_by_parity: list[list[int]] = []
            for _ in range(NUM_SLOTS):
                if memory_kind == "device":
                    on_devices = [self._driver.empty(d, _SLOT_NBYTES) for d in self._devices]
                    slots_by_parity.append([memory.address for memory in on_devices])
                    self._allocations += on_devices
                else:
                    pinned = [self._driver.pinned(d, _SLOT_NBYTES // 8) for d in self._devices]
                    slots_by_parity.append([*map(_address, pinned)])
                    self._allocations += pinned
            self._slots[memory_kind] = slots_by_parity
        return self._slots[memory_kind]

    def _buffer_addresses(
        self, job: AllReduceCall, order: Sequence[int], offset: int, slots: list[list[int]] | None
    ) -> list[int]:
        """Return the addresses of inputs, outputs and slots of this call, in protocol order."""
        own_slots = slots[self._num_calls % NUM_SLOTS] if slots else [0] * len(order)
        return [
            *(job.inputs[rank] + offset for rank in order),
            *(job.outputs[rank] + offset for rank in order),
            *(own_slots[rank] for rank in order),
        ]


class _LaunchedCall(NamedTuple):
    schedule: Protocol
    route: Route
    kernel: Kernel
    most_blocks: int
    programs: list[DeviceMemory]
    addresses: list[int]
    job: AllReduceCall
    length: int  # elements of the kernel's type
    itemsize: int


def _address(array: Any) -> int:
    return int(array.ctypes.data)
