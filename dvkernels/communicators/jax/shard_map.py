"""Communicator of JAX devices: each collective one compiled ``shard_map`` over all replicas."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import jax
import numpy as np

from dvkernels import deadlines
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.jax import lowering
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import interop, jax_devices
from dvkernels.devices.array_spec import spec
from dvkernels.devices.device import Device
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveTimeoutError,
    DvKernelsError,
    WorkerLostError,
)
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import partition
from dvkernels.user_errors import text_of

__all__: list[str] = []


_launching = threading.RLock()
_STATUS = re.compile(r"[A-Z_]{5,}: ")  # how errors of XLA begin, some of which are ValueErrors


def launch(program: Callable[[], Any]) -> Any:
    """Return ``program()``, which launches a program of several devices, one at a time.

    Two threads that launch in different orders on different devices would wait for each other
    within XLA.
    """
    seconds = deadlines.timeout_seconds()
    try:
        if not _launching.acquire(timeout=seconds):
            raise CollectiveTimeoutError(
                f"another thread has been launching a program of JAX for {seconds:g} s"
            )
        return program()
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            _launching.release()
        except RuntimeError:  # not ours
            pass


def assembled(arrays: Sequence[Any], mesh: Any) -> Any:
    """Return one global array of one array per local device, its whole copy of it."""
    sharding = jax_devices.replicated(mesh)
    return jax.make_array_from_single_device_arrays(arrays[0].shape, sharding, list(arrays))


def taken_apart(whole: Any) -> tuple[Any, ...]:
    """Return the arrays of a global array, one per local device, in the order of the replicas."""
    # A private name. The public one makes, for 15 us, shards that say which part each of them is.
    arrays = getattr(whole, "_arrays", None)
    return tuple(arrays or (shard.data for shard in whole.addressable_shards))


@final
class ShardMap:
    """Communicator whose ranks are JAX devices, of one process or of all that ``workers`` counts.

    Arrays of NumPy are reduced by ``host``, in host memory: a step may mix both. Several processes
    agree on each program before they launch it, since nobody could end one that waits for them.
    ``in_background``: arrays of JAX go through host memory too, as XLA needs one order of programs.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        host: Communicator,
        mesh: Any,
        workers: Workers,
        first_rank: int,
        in_background: bool = False,
    ) -> None:
        self.size = int(mesh.size)
        self._host = host
        self._mesh = mesh
        self._workers = workers
        self._first_rank = first_rank
        self._by_host = in_background
        self._own = [jax_devices.own(device) for device in devices]

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays; ``out`` is for arrays of NumPy."""
        if out is not None or self._are_of_host("all_reduce", values):
            return self._host.all_reduce(values, op, out)
        if self._by_host or type(op) is CustomReduction:  # compiled by Numba, for host memory
            return self._on_devices(self._host.reduce(_on_host(values), op))
        self._agree("all_reduce", op.value, spec(values[0]))
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
        length, first = values[0].shape[0], self._first_rank
        bounds = [partition.bounds(length, self.size, first + k) for k in range(len(values))]
        reduced = self.all_reduce(values, op)
        return [array[start:stop] for array, (start, stop) in zip(reduced, bounds, strict=True)]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array on each device."""
        if self._are_of_host("all_gather", values):
            return self._host.all_gather(values, axis)
        rest = list(values[0].shape)
        del rest[axis]
        lengths = [value.shape[axis] for value in values]
        found = self._agree("all_gather", axis, rest, values[0].dtype, numbers=lengths)
        if len({length for each in found for length in each}) == 1:
            return self._each(values, _program(lowering.all_gather, self._mesh, axis))
        return self._on_devices(self._host.all_gather(_on_host(values), axis)[0])

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value to each device."""
        if self._are_of_host("broadcast", values):
            return self._host.broadcast(values, root)
        if self._workers.size == 1:
            return self._on_devices(values[root])
        self._agree("broadcast", root, spec(values[0]))
        return self._each(values, _program(lowering.broadcast, self._mesh, root))

    def _are_of_host(self, verb: str, values: Sequence[Any]) -> bool:
        of_jax = [interop.is_of_jax(value) for value in values]
        if any(of_jax) and not all(of_jax):
            raise BufferMismatchError(
                f"{verb} needs buffers of one library: that of replica {of_jax.index(True)} is of "
                f"JAX, that of replica {of_jax.index(False)} of NumPy; convert one of them"
            )
        return not of_jax[0]

    def _agree(self, verb: str, *terms: Any, numbers: Sequence[int] = ()) -> list[list[int]]:
        """Return the numbers of all workers, once all ask for the same program."""
        if self._workers.size == 1:
            return [[*numbers]]
        return self._workers.agree(numbers, verb, "of JAX", *map(str, terms))

    def _on_devices(self, array: Any) -> list[Any]:
        return [jax.device_put(array, device, may_alias=False) for device in self._own]

    def _each(self, values: Sequence[Any], program: Callable[[Any], Any]) -> list[Any]:
        """Return the results of a program, one on each device."""
        placed = [
            jax.device_put(value, device) for value, device in zip(values, self._own, strict=True)
        ]
        whole = assembled(placed, self._mesh)
        if self._workers.size == 1:
            return [*taken_apart(launch(functools.partial(program, whole)))]
        with losses_of(self._workers):
            results = taken_apart(launch(functools.partial(program, whole)))
            await_program(results, self._workers)
        return [*results]


def _on_host(values: Sequence[Any]) -> list[Any]:
    return [np.asarray(value) for value in values]


def await_program(results: Sequence[Any], workers: Any) -> None:
    """Wait for results of a program; raise ``WorkerLostError`` if another worker is gone."""
    if workers.size > 1:
        workers.transport.await_program(lambda: all(array.is_ready() for array in results))
    jax.block_until_ready(results)


@contextlib.contextmanager
def losses_of(workers: Workers) -> Iterator[None]:
    """Raise ``WorkerLostError``, on all workers, where a program of several processes fails inside.

    XLA does not say which process it has lost, and programs that wait for it never succeed.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if workers.size == 1 or isinstance(error, DvKernelsError):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(text_of(error)):
            workers.end(
                WorkerLostError(
                    f"a program of JAX failed on worker {workers.rank} of {workers.size}, most "
                    f"likely since another worker is lost: {text_of(error)}; start all of them "
                    f"again, from the latest checkpoint"
                )
            )
        if workers.has_ended:  # what a failed program was to write is gone
            workers.barrier()  # raises the error of the end
        raise


@functools.lru_cache(maxsize=256)
def _program(collective: Callable[..., Any], mesh: Any, argument: Any) -> Any:
    """Return a compiled collective, which JAX keeps for each shape and dtype."""
    return jax.jit(lowering.spmd(lambda value: collective(value, argument), mesh))
