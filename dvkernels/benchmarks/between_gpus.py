"""Benchmark of the all-reduce between the GPUs of a process: our protocols, and other libraries.

The limit is a copy from one GPU to the next: an all-reduce of S bytes on n GPUs moves 2 (n - 1)/n S
through each link. All implementations sum float32 out of place, in alternating rounds with the
copy. Each result is compared with NumPy's sum before it is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks import gpu
from dvkernels.benchmarks.gpu import Figure, MeasurementPlan
from dvkernels.benchmarks.stopwatch import alternate, timed
from dvkernels.communicators.nccl.communicator import Nccl
from dvkernels.devices import cuda, cuda_arrays, driver
from dvkernels.devices.device import Device
from dvkernels.errors import DeviceError, WorkerLostError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.multi_gpu import peer_access
from dvkernels.kernels.cuda.multi_gpu.group import AllReduceCall, DeviceGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import flag_all_reduce, flag_selection
from dvkernels.schedules.flag_selection import Route

__all__ = ["LIBRARIES", "Implementation", "Library", "Timer", "measure"]

_NAME = "all_reduce between GPUs"
_FLOAT = np.dtype("f4")

Timer = Callable[[int], float]  # number of calls -> seconds per call, until all work has ended
# Given the inputs, one per GPU, and the outputs, returns the timer of their all-reduce.
Implementation = Callable[["_MultiGpuBench", Sequence[Any], Sequence[Any]], Timer]


class Library(NamedTuple):
    """Library to measure next to our protocols.

    ``start``, given the GPUs and a stack that ends it, raises ``DeviceError`` or
    ``WorkerLostError`` if the library is missing.
    """

    start: Callable[[Sequence[int], contextlib.ExitStack], Implementation]
    has_outputs_here: bool = True  # False: its arrays are in other processes, which compare them


class _MultiGpuBench:
    """State shared by all implementations: GPUs, their peer access, arrays, synchronized timing."""

    def __init__(self, devices: Sequence[int], plan: MeasurementPlan) -> None:
        found = driver.find()
        if found is None:
            raise DeviceError(f"{_NAME}: no NVIDIA driver was found")
        self.devices, self.plan, self.driver = tuple(devices), plan, found
        self.arrays = cuda.arrays()
        self.reach = peer_access.reach(found, self.devices)
        self.group = DeviceGroup(self.devices, peer_access.PeerAccess(found))
        self.rng = np.random.default_rng(0)

    def empty(self, count: int) -> list[Any]:
        return [self.arrays.empty(device, (count,), _FLOAT) for device in self.devices]

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        def all_calls() -> None:
            for _ in range(calls):
                call()
            for device in self.devices:
                self.driver.synchronize(device)

        return timed(all_calls, 1) / calls


def measure(
    devices: Sequence[int],
    plan: MeasurementPlan,
    libraries: Mapping[str, Library],
) -> list[Figure]:
    """Return a figure of the all-reduce between GPUs for each size; raise if a result is wrong.

    ``libraries`` are measured next to our protocols. With a single GPU, and for missing libraries,
    there are figures that say so.
    """
    if len(devices) < 2:
        return [_missing(_NAME, len(devices), f"it takes two GPUs, and there is {len(devices)}")]
    bench = _MultiGpuBench(devices, plan)
    with contextlib.ExitStack() as stack:
        absent: list[Figure] = []
        others = _started(libraries, devices, stack, absent)
        every = {"auto": _auto, **_protocols(bench), **others}
        remote = {name for name in others if not libraries[name].has_outputs_here}
        figures = [_figure(bench, nbytes, every, remote) for nbytes in plan.between_nbytes]
        return [*figures, *absent]


def _figure(
    bench: _MultiGpuBench,
    nbytes: int,
    implementations: Mapping[str, Implementation],
    remote: Collection[str],
) -> Figure:
    count, num = nbytes // _FLOAT.itemsize, len(bench.devices)
    host = [bench.rng.integers(-99, 100, count).astype(_FLOAT) for _ in range(num)]
    inputs, outs = bench.empty(count), bench.empty(count)
    for array, content in zip(inputs, host, strict=True):
        bench.arrays.copy(array, content)
    expected = np.sum(host, axis=0, dtype=_FLOAT)
    calls = bench.plan.small_calls if nbytes <= bench.plan.small_nbytes else bench.plan.calls
    timers: dict[str, Callable[[], float]] = {}
    for name, implementation in implementations.items():
        for out in outs:
            bench.arrays.copy(out, np.zeros(count, _FLOAT))
        timer = implementation(bench, inputs, outs)
        timer(1)
        if name not in remote:
            gpu.compare(bench.arrays, f"{_NAME}, {name}", outs, expected, 0.0)
        timers[name] = lambda timer=timer: timer(calls)  # type: ignore[misc]

    def copy() -> None:
        bench.arrays.copy(outs[1], inputs[0])

    timers["copy"] = lambda: bench.seconds(copy, bench.plan.calls)
    found = alternate(timers, bench.plan.rounds)
    ours, moved = found["auto"], round(2 * (num - 1) / num * nbytes)
    attained = moved / ours.median / (nbytes / found["copy"].median)
    neighbours = {name: samples.median for name, samples in found.items() if name != "auto"}
    return Figure(
        f"{_NAME}, auto", num, nbytes, _FLOAT.name, ours.median, ours.quartiles, moved, attained,
        neighbours,
    )  # fmt: skip


def _auto(bench: _MultiGpuBench, inputs: Sequence[Any], outs: Sequence[Any]) -> Timer:
    return lambda calls: bench.seconds(lambda: kernels.all_reduce(inputs, out=outs), calls)


def _protocols(bench: _MultiGpuBench) -> dict[str, Implementation]:
    """Return the protocols that these GPUs can run, by name."""
    ranks, blocks = tuple(range(len(bench.devices))), driver.launches_block()
    found: dict[str, Route] = {}
    # Some memory pools give other GPUs no access; this asks about the pool of bench.arrays.
    probes = cuda_arrays.locate(_NAME, bench.empty(1))
    is_open = all(bench.driver.is_open(checks.address(probe.array)) for probe in probes)
    if is_open and all(all(row) for row in bench.reach):
        for name in ("one_shot", "two_shot", "ring"):
            found[name] = Route(flag_all_reduce.PROTOCOLS[name], ranks, not blocks)
    elif is_open and flag_selection.ring_order(bench.reach) is not None:
        found["ring"] = flag_selection.choose(
            bench.reach, bench.devices, 1, "ring", launches_block=blocks
        )
    found["staged"] = Route(flag_all_reduce.staged, ranks, False, "host")
    return {name: _protocol(route) for name, route in found.items()}


def _protocol(route: Route) -> Implementation:
    def implementation(bench: _MultiGpuBench, inputs: Sequence[Any], outs: Sequence[Any]) -> Timer:
        placed = cuda_arrays.locate(_NAME, [*inputs, *outs])
        addresses = [checks.address(each.array) for each in placed]
        num = len(inputs)
        streams = [each.stream for each in placed[:num]]
        call = AllReduceCall(
            addresses[:num], addresses[num:], placed[0].array.size, _FLOAT, ReduceOp.SUM, streams
        )
        return lambda calls: bench.seconds(lambda: bench.group.all_reduce(call, route), calls)

    return implementation


def _nccl(devices: Sequence[int], stack: contextlib.ExitStack) -> Implementation:
    nccl = Nccl([Device("cuda", device) for device in devices])
    return lambda bench, inputs, outs: (
        lambda calls: bench.seconds(lambda: nccl.all_reduce(inputs, ReduceOp.SUM, outs), calls)
    )


LIBRARIES = {"nccl": Library(_nccl)}


def _started(
    libraries: Mapping[str, Library],
    devices: Sequence[int],
    stack: contextlib.ExitStack,
    absent: list[Figure],
) -> dict[str, Implementation]:
    """Start the libraries that are installed; for the others append why not to ``absent``."""
    found: dict[str, Implementation] = {}
    for name, library in libraries.items():
        try:
            found[name] = library.start(devices, stack)
        except (DeviceError, WorkerLostError) as error:
            absent.append(_missing(f"{_NAME}, {name}", len(devices), str(error)))
    return found


def _missing(name: str, num_gpus: int, reason: str) -> Figure:
    note = f"not measured: {reason}"
    return Figure(name, num_gpus, 0, _FLOAT.name, None, None, 0, None, {}, note)
