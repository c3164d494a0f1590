"""Communicator of JAX devices: each collective one compiled ``shard_map`` over all replicas."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import numpy as np

from dvkernels.communicators.base import Communicator
from dvkernels.communicators.jax import lowering
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import interop, jax_devices
from dvkernels.devices.device import Device
from dvkernels.errors import BufferMismatchError
from dvkernels.reduce_op import Reduction

__all__: list[str] = []


# Held while a program of several devices is launched: two threads that launch in different orders
# on different devices would wait for each other within XLA.
launching = threading.Lock()


def assembled(arrays: Sequence[Any], devices: tuple[Device, ...]) -> Any:
    """Return one global array of one array per device, which is each device's whole copy of it."""
    sharding = jax_devices.replicated(devices)
    return jax.make_array_from_single_device_arrays(arrays[0].shape, sharding, list(arrays))


def taken_apart(whole: Any) -> tuple[Any, ...]:
    """Return the arrays of a global array, one per device, in the order of the replicas."""
    return tuple(shard.data for shard in whole.addressable_shards)


@final
class ShardMap:
    """Communicator whose ranks are JAX devices of one process.

    Arrays of NumPy are reduced by ``host``, in host memory: a step may mix both.
    """

    def __init__(self, devices: Sequence[Device], host: Communicator) -> None:
        self.size = len(devices)
        self._devices = tuple(devices)
        self._host = host
        self._mesh = jax_devices.mesh(self._devices)
        self._own = [jax_devices.own(device) for device in devices]

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays; ``out`` is for arrays of NumPy."""
        if out is not None or self._are_of_host("all_reduce", values):
            return self._host.all_reduce(values, op, out)
        if type(op) is CustomReduction:  # compiled by Numba, for host memory
            reduced = self._host.reduce([np.asarray(value) for value in values], op)
            return [jax.device_put(reduced, device) for device in self._own]
        return self._each(values, _program(lowering.all_reduce, self._mesh, op))

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array, on the first device."""
        if self._are_of_host("reduce", values):
            return self._host.reduce(values, op)
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce; part r stays on device r."""
        if self._are_of_host("reduce_scatter", values):
            return self._host.reduce_scatter(values, op)
        small, extra = divmod(values[0].shape[0], self.size)
        lengths = [small + (rank < extra) for rank in range(self.size)]
        bounds = [0, *itertools.accumulate(lengths)]
        reduced = self.all_reduce(values, op)
        return [reduced[rank][bounds[rank] : bounds[rank + 1]] for rank in range(self.size)]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array on each device."""
        if self._are_of_host("all_gather", values):
            return self._host.all_gather(values, axis)
        if len({value.shape for value in values}) == 1:
            return self._each(values, _program(lowering.all_gather, self._mesh, axis))
        whole = np.concatenate([np.asarray(value) for value in values], axis)
        return [jax.device_put(whole, device) for device in self._own]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value to each device."""
        if self._are_of_host("broadcast", values):
            return self._host.broadcast(values, root)
        return [jax.device_put(values[root], device, may_alias=False) for device in self._own]

    def _are_of_host(self, verb: str, values: Sequence[Any]) -> bool:
        of_jax = [interop.is_of_jax(value) for value in values]
        if any(of_jax) and not all(of_jax):
            raise BufferMismatchError(
                f"{verb} needs buffers of one library: that of replica {of_jax.index(True)} is of "
                f"JAX, that of replica {of_jax.index(False)} of NumPy; convert one of them"
            )
        return not of_jax[0]

    def _each(self, values: Sequence[Any], program: Callable[[Any], Any]) -> list[Any]:
        """Return the results of a program, one on each device."""
        placed = [
            jax.device_put(value, device) for value, device in zip(values, self._own, strict=True)
        ]
        whole = assembled(placed, self._devices)
        with launching:
            return [*taken_apart(program(whole))]


@functools.lru_cache(maxsize=256)
def _program(collective: Callable[..., Any], mesh: Any, argument: Any) -> Any:
    """Return a compiled collective, which JAX keeps for each shape and dtype."""
    return jax.jit(lowering.spmd(lambda value: collective(value, argument), mesh))
