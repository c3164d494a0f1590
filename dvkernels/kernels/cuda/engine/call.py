"""What every call on GPU arrays does around its launch: checks, places, streams, new arrays.

A call reads where its buffers lie, checks them, puts its work on one stream and orders the others
by events. The host waits for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda, cuda_arrays, driver, stream_order
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import job
from dvkernels.kernels.cuda.engine.job import Order

__all__ = ["AllReduce", "Buffers", "Call", "wait_for"]

Array = np.ndarray[Any, Any]


class Call:
    """One call: where its arrays lie, on which stream its work goes, what it returns.

    Parameters
    ----------
    verb : str
        What messages call it.
    stream
        As the caller passed it.
    """

    def __init__(self, verb: str, stream: Any = None) -> None:
        cuda.require(verb)
        self.verb = verb
        self._given = stream
        self._placed: list[cuda_arrays.DeviceBuffer] = []
        self._names: list[str] = []

    def place(self, buffers: Any, verb: str = "", name: str = "replica") -> list[Array]:
        """Return buffers as arrays; the work is ordered with what else is done to them."""
        found = cuda_arrays.place(verb or self.verb, buffers, name)
        self._placed += found
        self._names += (f"{name} {k}" for k in range(len(found)))
        return [one.array for one in found]

    def new(
        self, shapes: Sequence[tuple[int, ...]], dtype: Any, beside: bool = False
    ) -> tuple[list[Any], list[Array]]:
        """Return new arrays of the library that makes them, and as arrays over their memory.

        On the GPU where the work is done, or each beside the buffer of its number.
        """
        home = self._joined().home
        where = [Order(one.device, one.stream) for one in self.places()] if beside else []
        made = [
            cuda.arrays().empty(order.device, shape, dtype, order.stream)
            for shape, order in zip(shapes, where or [home] * len(shapes), strict=False)
        ]
        placed = cuda_arrays.place(self.verb, made, "out")
        return made, [one.array for one in placed]

    @contextlib.contextmanager
    def ordered(self) -> Iterator[Order]:
        """Order what is launched inside after what made the buffers, and before what follows."""
        joined = self._joined()
        if self.is_spread:
            self._check_reach(joined.home.device)
        for other in joined.before:
            wait_for(joined.home, other)
        try:
            yield joined.home
        finally:
            for other in joined.after:
                wait_for(other, joined.home)

    @property
    def is_spread(self) -> bool:
        """Whether the buffers lie on more than one GPU."""
        return len({one.device for one in self._placed}) > 1

    def places(self) -> list[cuda_arrays.DeviceBuffer]:
        """Return where each buffer, and then each out, lies, with the stream to use there."""
        given = stream_order.given(self.verb, self._given, len(self._placed))
        if given is None:
            return self._placed
        pairs = zip(self._placed, given, strict=True)
        return [one._replace(stream=stream) for one, stream in pairs]

    def _joined(self) -> stream_order.Joined[Order]:
        """Return where the work goes, and what else must be ordered with it."""
        return stream_order.join([Order(one.device, one.stream) for one in self.places()])

    def _check_reach(self, home: int) -> None:
        """Raise unless one GPU reaches all arrays of the call."""
        found = driver.find()
        assert found is not None  # it has told where the buffers lie
        for name, one in zip(self._names, self._placed, strict=True):
            if one.device == home:
                continue
            if not found.open_peer(home, one.device):
                raise DeviceError(
                    f"{self.verb}: cuda:{home} reads and writes for all, and does not reach "
                    f"cuda:{one.device}, where {name} lies; bring the buffers to one GPU "
                    "(all_reduce works without)"
                )
            if one.array.size and not found.is_open(checks.address(one.array)):
                raise DeviceError(
                    f"{self.verb}: {name}, on cuda:{one.device}, lies in memory of a pool that is "
                    f"closed to cuda:{home}; allocate it with cudaMalloc, as CuPy does by default, "
                    "or bring the buffers to one GPU"
                )


class Buffers(Call):
    """A call on one array per replica, with results in ``out``, in new arrays or in place."""

    def __init__(self, verb: str, buffers: Any, out: Any, stream: Any) -> None:
        super().__init__(verb, stream)
        self.buffers = checks.as_sequence(verb, buffers)
        self.results: Any = self.buffers
        self.reads = self.place(self.buffers)
        self.out: list[Array] | None = None
        if out is not None:
            self.results = checks.as_sequence(verb, out, "out")
            self.out = self.place(self.results, name="out")

    def made(self, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Return new arrays to write to; the call will return them, alike to the buffers."""
        beside = len(shapes) == len(self.reads)
        made, arrays = self.new(shapes, self.reads[0].dtype, beside)
        pairs = zip(made, self.buffers, strict=False)
        self.results = [cuda_arrays.like(one, buffer) for one, buffer in pairs]
        return arrays


class AllReduce(Buffers):
    """An all-reduce of arrays that fit together, by an op that GPUs can do on them.

    Its results go to the buffers (``out`` is None), to new arrays (``checks.NEW``), or to ``out``.
    """

    def __init__(self, verb: str, buffers: Any, op: Any, out: Any, stream: Any) -> None:
        self._makes_new = out is checks.NEW
        super().__init__(verb, buffers, None if self._makes_new else out, stream)
        checks.arrays(verb, self.reads)
        self.dtype = self.reads[0].dtype
        self.op = job.checked(verb, op, self.dtype)
        self.is_in_place = out is None

    def written(self) -> list[Array]:
        """Return the arrays that get the results; raise unless they can be written to."""
        if self.is_in_place:
            checks.check_in_place(self.verb, self.reads)
            return self.reads
        if self._makes_new:
            return self.made([read.shape for read in self.reads])
        return checks.outputs_like(self.verb, self.reads, self.out)


def wait_for(waiting: Order, awaited: Order) -> None:
    """Let one stream wait for what another was given by now, of whatever device."""
    found = driver.find()
    if found is None:  # in the simulator everything has happened when a call returns
        return
    if waiting.device == awaited.device:
        found.wait(waiting.device, waiting.stream, awaited.stream)
        return
    event = found.record(awaited.device, awaited.stream)
    found.await_event(waiting.device, waiting.stream, event)
    found.destroy(event)
