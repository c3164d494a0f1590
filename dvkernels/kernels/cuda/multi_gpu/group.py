"""A team: the ranks of one process on different devices, and what they share.

Each rank has flags and slots in memory of its device, and the programs of the protocols it has
run. In memory of the host, which all devices reach, lie the stop word, and for each rank one word
a peer that says for which epoch it waited in vain.

One thread launches for all ranks. Nothing is launched before everything that a call needs is
compiled and loaded, and its programs are written, on every device: loading and allocating may wait
for a device, and that may be waiting, in a launch, for the one that comes next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import operations
from dvkernels.kernels.cuda.multi_gpu import flag_kernel
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.schedules.flag_protocol import NUM_SLOTS, Combine, Signal
from dvkernels.schedules.flag_protocol import Protocol as Schedule
from dvkernels.schedules.flag_selection import Route

__all__ = ["MOST_BLOCKS", "AllReduceCall", "DeviceGroup", "GroupDriver"]

MOST_BLOCKS = 32
# What a block should have to do, so that a launch is not spread thin; not measured on hardware.
_BLOCK_NBYTES = 16 * 1024
_SLOT_NBYTES = 4 * 1024 * 1024
_ABORTED = 2  # in the stop word: from outside; 1: by a rank, at its deadline


class DeviceMemory(Protocol):
    """Memory of a device, kept as long as this object."""

    address: int


class GroupDriver(Protocol):
    """What a team asks of its devices."""

    def empty(self, device: int, nbytes: int) -> DeviceMemory:
        """Allocate memory at a multiple of 256 bytes."""

    def words(self, device: int, words: Sequence[int]) -> DeviceMemory:
        """Allocate memory that holds int64 words when this returns."""

    def pinned(self, num_words: int) -> Any:
        """Return int64 words of the host, zero, that devices reach at the same address."""

    def load(self, device: int, kernel: Callable[..., None]) -> None:
        """Compile a kernel, unless it is, and load it onto the device."""

    def launch(
        self,
        device: int,
        kernel: Callable[..., None],
        num_blocks: int,
        stream: Any,
        words: Sequence[int],
    ) -> None:
        """Launch a loaded kernel; never wait for a device."""

    def record(self, device: int, stream: Any) -> Any:
        """Return an event after all that the stream holds by now."""

    def wait(self, device: int, stream: Any, event: Any) -> None:
        """Let the stream wait for an event, of whatever device."""

    def synchronize(self, device: int) -> None:
        """Wait until a device has nothing left to do."""


class AllReduceCall(NamedTuple):
    """An all-reduce: the addresses of dense buffers of one length, one a rank, and what to do."""

    inputs: Sequence[int]
    outputs: Sequence[int]  # those of the inputs where it works in place
    length: int
    dtype: np.dtype[Any]
    op: Reduction
    streams: Sequence[Any]


class DeviceGroup:
    """Ranks that reduce by the protocols of schedules/flag_all_reduce.py.

    Parameters
    ----------
    devices : sequence of int
        The device of each rank.
    driver : GroupDriver
        How devices are reached.
    timeout_seconds : float
        How long a rank waits for another, within a launch, before all give up.

    Notes
    -----
    A team's calls are ordered: on each rank, a call comes after the one before, also where the
    stream is another one. After a rank has given up, or ``abort``, results mean nothing, and every
    call and ``check`` raise ``CollectiveTimeoutError`` until ``recover``.
    """

    def __init__(
        self, devices: Sequence[int], driver: GroupDriver, *, timeout_seconds: float = 600.0
    ) -> None:
        self._devices, self._driver = tuple(devices), driver
        self._deadline_ns = round(timeout_seconds * 1e9)
        self._timeout_seconds = timeout_seconds
        num_ranks = len(self._devices)
        self._shared = driver.pinned(1 + num_ranks**2)
        unset = [0] * (num_ranks * MOST_BLOCKS)
        self._flags = [driver.words(device, unset) for device in self._devices]
        self._slots: dict[str, list[list[int]]] = {}
        self._programs: dict[tuple[str, tuple[int, ...]], list[DeviceMemory]] = {}
        self._loaded: set[Callable[..., None]] = set()
        self._kept: list[Any] = []
        self._last_streams: dict[int, Any] = {}
        self._epoch = 0
        self._num_calls = 0
        # Two threads that launch at once must not be first on one device each.
        self._launching = threading.RLock()

    def all_reduce(self, job: AllReduceCall, route: Route, *, is_captured: bool = False) -> None:
        """Launch an all-reduce; return before it has run.

        Captured into a graph, it is ordered with other calls by whoever launches the graph.

        Raises
        ------
        CollectiveTimeoutError
            An earlier call failed; nothing has been launched.
        """
        schedule = route.make(len(self._devices))
        operation, code = operations.told(job.op, job.dtype)
        make = flag_kernel.waiting_kernel if route.waits else flag_kernel.row_kernel
        kernel = make(operation, code)
        itemsize = arithmetic.dtype_of(code).itemsize
        count = job.length * arithmetic.factor(job.op, job.dtype)
        try:
            self._launching.acquire()
            self.check()
            self._load(kernel)
            programs = self._ready_programs(schedule, route.order)
            slots = self._ready_slots(route) if schedule.uses_slots else None
            if not is_captured:
                self._order_streams(job.streams)
            longest = _SLOT_NBYTES // itemsize if slots else max(1, count)
            for begin in range(0, count, longest):
                length = min(longest, count - begin)
                places = self._places(job, route.order, begin * itemsize, slots)
                self._launch(
                    _LaunchedCall(schedule, route, kernel, programs, places, job, length, itemsize)
                )
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._launching.release()
            except RuntimeError:  # not ours: the wait was interrupted
                pass

    def _launch(self, call: _LaunchedCall) -> None:
        """Launch the kernels of a call, one a rank, or its rows, one by one."""
        order, streams = call.route.order, call.job.streams
        divisor = len(order) if call.job.op is ReduceOp.MEAN else 1
        nbytes = call.length * call.itemsize // call.schedule.num_parts
        num_blocks = max(1, min(MOST_BLOCKS, nbytes // _BLOCK_NBYTES))
        num_parts = call.schedule.num_parts
        share = flag_kernel.shares(call.length, call.itemsize, num_parts, num_blocks)

        def launch(place: int, row: int) -> None:
            words = flag_kernel.call_words(
                call.programs[place].address,
                self._epoch,
                call.length,
                divisor,
                self._deadline_ns,
                row,
                share,
                call.places,
            )
            rank = order[place]
            device, stream = self._devices[rank], streams[rank]
            self._driver.launch(device, call.kernel, num_blocks, stream, words)

        if call.route.waits:
            try:
                for place in range(len(order)):
                    launch(place, 0)
            except BaseException:
                self.abort()  # else those that were launched wait for the others
                raise
            self._epoch += call.schedule.num_stages
        else:
            told: dict[tuple[int, int], Any] = {}  # (writer, reader) -> event of the last signal
            for place, number in call.schedule.in_order():
                row, rank = call.schedule.rows[place][number], order[place]
                device, stream = self._devices[rank], streams[rank]
                if isinstance(row, Combine):
                    launch(place, number)
                elif isinstance(row, Signal):
                    event = self._driver.record(device, stream)
                    told.update({(place, peer): event for peer in row.ranks})
                else:
                    for peer in row.ranks:
                        self._driver.wait(device, stream, told[peer, place])
        self._num_calls += 1

    def check(self) -> None:
        """Raise ``CollectiveTimeoutError`` if a call failed that has run by now."""
        if self._shared[0] == 0:
            return
        num_ranks = len(self._devices)
        missed = self._shared[1:].reshape(num_ranks, num_ranks) != 0
        # Who waits is there; who is only waited for is not.
        absent = np.flatnonzero(missed.any(0) & ~missed.any(1))
        waited = "; ".join(
            f"rank {rank} waited for {self._named(np.flatnonzero(missed[rank]))}"
            for rank in np.flatnonzero(missed.any(1))
        )
        if self._shared[0] == _ABORTED:
            why = "it was aborted"
        elif absent.size:
            why = f"{self._named(absent)} did not come within {self._timeout_seconds} s"
        else:
            why = f"it took more than {self._timeout_seconds} s"
        raise CollectiveTimeoutError(
            f"an all-reduce between devices did not end: {why} ({waited or 'nobody waited'}); its "
            "results, and those of later calls, mean nothing; find out why, then call "
            "kernels.cuda.recover()"
        )

    def _named(self, ranks: Iterable[int]) -> str:
        return ", ".join(f"rank {rank} (cuda:{self._devices[rank]})" for rank in ranks)

    def abort(self) -> None:
        """End all waiting, on all devices: launched calls leave at once, wherever they are."""
        self._shared[0] = _ABORTED

    def recover(self) -> None:
        """Begin anew after a failure, when nothing runs any more: waits for all devices."""
        try:
            self._launching.acquire()
            for device in self._devices:
                self._driver.synchronize(device)
            # What was left behind in the flags is not above the epoch of the call that failed, or
            # that of those launched after it; a new epoch is above all of them.
            self._shared[:] = 0
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._launching.release()
            except RuntimeError:  # not ours: the wait was interrupted
                pass

    # -- what a call needs ------------------------------------------------------------------------

    def _load(self, kernel: Callable[..., None]) -> None:
        if kernel not in self._loaded:
            for device in {*self._devices}:
                self._driver.load(device, kernel)
            self._loaded.add(kernel)

    def _ready_programs(self, schedule: Schedule, order: tuple[int, ...]) -> list[DeviceMemory]:
        """Return the program of each place in the protocol, on the device of its rank."""
        key = schedule.name, order
        if key not in self._programs:
            flags = [self._flags[rank].address for rank in order]
            stop = _address(self._shared)
            programs = []
            for place, rank in enumerate(order):
                missed = [stop + 8 * (1 + rank * len(order) + peer) for peer in order]
                words = flag_kernel.program_words(
                    schedule, place, flag_kernel.SharedAddresses(flags, missed, stop)
                )
                programs.append(self._driver.words(self._devices[rank], words))
            self._programs[key] = programs
        return self._programs[key]

    def _ready_slots(self, route: Route) -> list[list[int]]:
        """Return the addresses of the slots of all ranks, for even and for odd calls."""
        where = route.slots
        if where not in self._slots:
            both: list[list[int]] = []
            for _ in range(NUM_SLOTS):
                if where == "device":
                    on_devices = [self._driver.empty(d, _SLOT_NBYTES) for d in self._devices]
                    both.append([memory.address for memory in on_devices])
                    self._kept += on_devices
                else:
                    pinned = [self._driver.pinned(_SLOT_NBYTES // 8) for _ in self._devices]
                    both.append([*map(_address, pinned)])
                    self._kept += pinned
            self._slots[where] = both
        return self._slots[where]

    def _order_streams(self, streams: Sequence[Any]) -> None:
        """Let each rank's stream wait for the calls before, where those went to another."""
        for rank, stream in enumerate(streams):
            last, device = self._last_streams.get(rank, stream), self._devices[rank]
            if last != stream:
                self._driver.wait(device, stream, self._driver.record(device, last))
            self._last_streams[rank] = stream

    def _places(
        self, job: AllReduceCall, order: Sequence[int], offset: int, slots: list[list[int]] | None
    ) -> list[int]:
        """Return the addresses that the rows of this call speak of, in the order of the ranks."""
        own = slots[self._num_calls % NUM_SLOTS] if slots else [0] * len(order)
        return [
            *(job.inputs[rank] + offset for rank in order),
            *(job.outputs[rank] + offset for rank in order),
            *(own[rank] for rank in order),
        ]


class _LaunchedCall(NamedTuple):
    schedule: Schedule
    route: Route
    kernel: Callable[..., None]
    programs: list[DeviceMemory]
    places: list[int]
    job: AllReduceCall
    length: int  # elements of the kernel's type
    itemsize: int


def _address(array: Any) -> int:
    return int(array.ctypes.data)
