"""What every call on GPU arrays does around its launch: places, streams, new arrays, results.

A call reads where its buffers lie, checks them, puts its work on one stream and orders the others
by events. The host waits for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dvkernels.devices import cuda, driver, gpu_arrays, streams
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.jobs import Order

__all__ = ["Buffers", "Call"]

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
        self._placed: list[gpu_arrays.Placed] = []
        self._names: list[str] = []

    def place(self, buffers: Any, verb: str = "", name: str = "replica") -> list[Array]:
        """Return buffers as arrays; the work is ordered with what else is done to them."""
        found = gpu_arrays.place(verb or self.verb, buffers, name)
        self._placed += found
        self._names += (f"{name} {k}" for k in range(len(found)))
        return [one.array for one in found]

    def new(self, shapes: Sequence[tuple[int, ...]], dtype: Any) -> tuple[list[Any], list[Array]]:
        """Return new arrays of the library that makes them, and as arrays over their memory."""
        order, _ = self._order()
        made = [cuda.arrays().empty(order.device, shape, dtype, order.stream) for shape in shapes]
        return made, [one.array for one in gpu_arrays.place(self.verb, made, "out")]

    @contextlib.contextmanager
    def ordered(self) -> Iterator[Order]:
        """Order what is launched inside after what made the buffers, and before what follows."""
        order, joined = self._order()
        for stream in joined.before:
            _wait(order.device, order.stream, stream)
        try:
            yield order
        finally:
            for stream in joined.after:
                _wait(order.device, stream, order.stream)

    def _order(self) -> tuple[Order, streams.Joined]:
        where = [one.device for one in self._placed]
        if len({*where}) > 1:
            pairs = zip(self._names, where, strict=True)
            places = ", ".join(f"{name} on cuda:{device}" for name, device in pairs)
            raise DeviceError(
                f"{self.verb} works within one GPU so far: {places}; bring the buffers to one"
            )
        given = streams.given(self.verb, self._given, len(where))
        joined = streams.join(given or [one.stream for one in self._placed])
        return Order(where[0], joined.home), joined


class Buffers(Call):
    """A call on one array per replica, with results in ``out``, in new arrays or in place."""

    def __init__(self, verb: str, buffers: Any, out: Any, stream: Any) -> None:
        super().__init__(verb, stream)
        self.buffers = checks.listed(verb, buffers)
        self.results: Any = self.buffers
        self.reads = self.place(self.buffers)
        self.out: list[Array] | None = None
        if out is not None:
            self.results = checks.listed(verb, out, "out")
            self.out = self.place(self.results, name="out")

    def made(self, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Return new arrays to write to; the call will return them, alike to the buffers."""
        made, arrays = self.new(shapes, self.reads[0].dtype)
        pairs = zip(made, self.buffers, strict=False)
        self.results = [gpu_arrays.like(one, buffer) for one, buffer in pairs]
        return arrays


def _wait(device: int, waiting: int, awaited: int) -> None:
    found = driver.find()
    if found is not None:  # in the simulator everything has happened when a call returns
        found.wait(device, waiting, awaited)
