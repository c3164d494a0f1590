"""CUDA streams of the replicas of a strategy, ordered by events while the host waits for nothing.

Each replica has its own stream, current in its thread. Three rules order the streams:

* a step comes after the work that its caller has put on current streams before, and before the work
  that the caller puts there afterwards;
* the work of a rendezvous, done for all replicas, comes after the earlier work of each replica's
  stream and before its later work;
* work on a device's default stream, which PyTorch and Numba use, is ordered with both, because the
  replicas' streams and the default stream wait for each other.

The work of a rendezvous has its own stream on each device. Memory that is allocated on it returns
to that stream's part of the pool and is reused only in a later rendezvous, which waits for all
replicas: so an array that one replica drops is not overwritten while another replica uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dvkernels import user_errors
from dvkernels.devices import cuda, cuda_arrays
from dvkernels.devices.stream_order import DeviceStream, wait_pairs

__all__ = ["StreamOrder"]


class StreamOrder:
    """Streams of a strategy's replicas, made on first use.

    Parameters
    ----------
    devices : sequence of int
        The GPU of each replica.
    arrays : ArrayLibrary, optional
        Makes the streams; that of this process if not given.
    order : callable, optional
        Makes the first stream of each pair wait for the second; by the driver if not given.
    """

    def __init__(
        self,
        devices: Sequence[int],
        arrays: cuda.ArrayLibrary | None = None,
        order: Callable[
            [Sequence[tuple[DeviceStream, DeviceStream]]], None
        ] = cuda_arrays.order_streams,
    ) -> None:
        self._devices = tuple(devices)
        self._arrays = arrays or cuda.arrays()
        self._order = order
        self._own: list[Any] = []
        self._shared: dict[int, Any] = {}
        self._made: dict[int, tuple[dict[int, Any], list[Any]]] = {}

    @user_errors.context_manager
    def step(self) -> Iterator[None]:
        """Order the step inside ``with`` after its caller's earlier work, before its later work."""
        own, callers = self._device_streams(), self._callers()
        self._order(wait_pairs(own, callers))
        try:
            yield
        finally:
            self._order(wait_pairs(callers, own))

    def exchange(self) -> None:
        """Order the later work of the replicas and of the caller after the other's earlier work."""
        own, callers = self._device_streams(), self._callers()
        self._order(wait_pairs(own, callers))
        self._order(wait_pairs(callers, own))

    def replica(self, rank: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that makes a replica's device and stream current."""
        return self._arrays.at(self._devices[rank], self._own[rank])

    def finish(self, rank: int) -> None:
        """Wait until the work on a replica's stream is complete."""
        with self._arrays.at(self._devices[rank]):
            self._own[rank].synchronize()

    def meet(self, act: Callable[[Any], Any], payloads: Any) -> Any:
        """Return ``act(payloads)``, the work of a rendezvous, ordered with all replicas."""
        own = self._device_streams()
        shared = [DeviceStream(device, stream.ptr) for device, stream in self._shared.items()]
        self._order(wait_pairs(shared, own))
        try:
            with contextlib.ExitStack() as current:
                for device, stream in reversed(self._shared.items()):  # that of replica 0 last
                    current.enter_context(self._arrays.at(device, stream))
                return act(payloads)
        finally:
            self._order(wait_pairs(own, shared))

    def _callers(self) -> list[DeviceStream]:
        return [DeviceStream(device, self._arrays.current(device).ptr) for device in self._shared]

    def _device_streams(self) -> list[DeviceStream]:
        if not self._own:
            shared = {
                device: self._arrays.stream(device, joins_default=True)
                for device in dict.fromkeys(self._devices)
            }
            own = [self._arrays.stream(device, joins_default=True) for device in self._devices]
            # If several threads make streams at once, those of the first are kept.
            self._shared, self._own = self._made.setdefault(0, (shared, own))
        return [
            DeviceStream(device, stream.ptr)
            for device, stream in zip(self._devices, self._own, strict=True)
        ]
