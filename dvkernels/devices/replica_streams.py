"""In which order the work of replicas happens on GPUs, while the host waits for nothing.

Each replica has a stream of its own, current in its thread. Three rules order them, by events:

* a step begins after what its caller has put on current streams, and what the caller puts there
  afterwards comes after the step;
* where replicas meet, what is done for all of them comes after what each has put on its stream
  before, and before what each puts there afterwards;
* work on a device's default stream, where PyTorch and Numba put theirs, comes between, since these
  streams wait for it and it for them.

What is done at a meeting has a stream of its own on each device. Memory that is allocated there
returns to that stream's part of the pool, and is given away again at a later meeting only, when all
replicas have been waited for: so whichever replica drops an array, nobody overwrites it too early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dvkernels import user_errors
from dvkernels.devices import cuda, cuda_arrays
from dvkernels.devices.stream_order import Lane, crossings

__all__ = ["StreamOrder"]


class StreamOrder:
    """The streams of a strategy's replicas, made when they are first needed.

    Parameters
    ----------
    devices : sequence of int
        The GPU of each replica.
    arrays : ArrayLibrary, optional
        What makes streams; that of this process if not given.
    order : callable, optional
        Has lanes wait for others; that of the driver if not given.
    """

    def __init__(
        self,
        devices: Sequence[int],
        arrays: cuda.ArrayLibrary | None = None,
        order: Callable[[Sequence[tuple[Lane, Lane]]], None] = cuda_arrays.order,
    ) -> None:
        self._devices = tuple(devices)
        self._arrays = arrays or cuda.arrays()
        self._order = order
        self._own: list[Any] = []
        self._homes: dict[int, Any] = {}
        self._made: dict[int, tuple[dict[int, Any], list[Any]]] = {}

    @user_errors.block
    def step(self) -> Iterator[None]:
        """Order a step, inside, after what its caller did and before what it does then."""
        own = self._lanes()
        callers = [Lane(device, self._arrays.current(device).ptr) for device in self._homes]
        self._order(crossings(own, callers))
        try:
            yield
        finally:
            self._order(crossings(callers, own))

    def replica(self, rank: int) -> contextlib.AbstractContextManager[Any]:
        """Return what makes a replica's device and stream current in its thread."""
        return self._arrays.at(self._devices[rank], self._own[rank])

    def meet(self, act: Callable[[Any], Any], payloads: Any) -> Any:
        """Return ``act(payloads)``, done for all replicas at once."""
        own = self._lanes()
        homes = [Lane(device, stream.ptr) for device, stream in self._homes.items()]
        self._order(crossings(homes, own))
        try:
            with contextlib.ExitStack() as current:
                for device, stream in reversed(self._homes.items()):  # that of replica 0 at last
                    current.enter_context(self._arrays.at(device, stream))
                return act(payloads)
        finally:
            self._order(crossings(own, homes))

    def _lanes(self) -> list[Lane]:
        if not self._own:
            homes = {
                device: self._arrays.stream(device, joins_default=True)
                for device in dict.fromkeys(self._devices)
            }
            own = [self._arrays.stream(device, joins_default=True) for device in self._devices]
            # Of those that several threads make at once one stays.
            self._homes, self._own = self._made.setdefault(0, (homes, own))
        return [
            Lane(device, stream.ptr)
            for device, stream in zip(self._devices, self._own, strict=True)
        ]
