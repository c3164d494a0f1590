"""All-reduce between the GPUs of this process: each protocol, NCCL and PyTorch, beside a copy.

The limit is a copy from one GPU to the next: an all-reduce of S bytes on n GPUs moves 2 (n - 1)/n S
through each link. All sum float32 out of place (PyTorch in place), in one run, in turn with the
copy. What anyone computes is compared with NumPy's sum before it is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks import gpu
from dvkernels.benchmarks.gpu import Figure, MeasurementPlan
from dvkernels.benchmarks.peers import registry
from dvkernels.benchmarks.peers.worker import Worker
from dvkernels.benchmarks.stopwatch import alternate, timed
from dvkernels.communicators.nccl.communicator import Nccl
from dvkernels.devices import cuda, cuda_arrays, driver
from dvkernels.devices.base import Device
from dvkernels.errors import DeviceError, WorkerLostError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.multi_gpu import peer_access
from dvkernels.kernels.cuda.multi_gpu.group import AllReduceCall, DeviceGroup
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules import flag_all_reduce, flag_selection
from dvkernels.schedules.flag_selection import Route

__all__ = ["Rival", "measure"]

_NAME = "all_reduce between GPUs"
_FLOAT = np.dtype("f4")

Measured = Callable[[int], float]  # the seconds of one of so many calls, all of which have ended
# What sums the first arrays, one a GPU, into the others; it says how long that takes.
Rival = Callable[["_MultiGpuBench", Sequence[Any], Sequence[Any]], Measured]


class _MultiGpuBench:
    """What all contestants need: GPUs, who reaches whom, arrays, a clock that waits for all."""

    def __init__(self, devices: Sequence[int], plan: MeasurementPlan) -> None:
        found = driver.find()
        if found is None:
            raise DeviceError(f"{_NAME}: no NVIDIA driver was found")
        self.devices, self.plan, self.driver = tuple(devices), plan, found
        self.arrays = cuda.arrays()
        self.reach = peer_access.reach(found, self.devices)
        self.team = DeviceGroup(self.devices, peer_access.PeerAccess(found))
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
    devices: Sequence[int], plan: MeasurementPlan, rivals: Mapping[str, Rival] | None = None
) -> list[Figure]:
    """Return the figures of so many GPUs; ``DeviceError`` where a result is wrong.

    Of one GPU, and of rivals that are not there, the figures say so.
    """
    if len(devices) < 2:
        return [_missing(_NAME, len(devices), f"it takes two GPUs, and {len(devices)} is there")]
    bench = _MultiGpuBench(devices, plan)
    with contextlib.ExitStack() as stack:
        absent: list[Figure] = []
        if rivals is None:
            rivals = _rivals(bench, stack, absent)
        every = {"auto": _auto, **_protocols(bench), **rivals}
        return [*(_figure(bench, nbytes, every) for nbytes in plan.between_nbytes), *absent]


def _figure(bench: _MultiGpuBench, nbytes: int, rivals: Mapping[str, Rival]) -> Figure:
    count, num = nbytes // _FLOAT.itemsize, len(bench.devices)
    host = [bench.rng.integers(-99, 100, count).astype(_FLOAT) for _ in range(num)]
    inputs, outs = bench.empty(count), bench.empty(count)
    for one, content in zip(inputs, host, strict=True):
        bench.arrays.copy(one, content)
    expected = np.sum(host, axis=0, dtype=_FLOAT)
    calls = bench.plan.small_calls if nbytes <= bench.plan.small_nbytes else bench.plan.calls
    contestants: dict[str, Callable[[], float]] = {}
    for name, rival in rivals.items():
        for out in outs:
            bench.arrays.copy(out, np.zeros(count, _FLOAT))
        measured = rival(bench, inputs, outs)
        measured(1)
        if name != _TORCH:  # which has its arrays, and compares them, in processes of its own
            gpu.compare(bench.arrays, f"{_NAME}, {name}", outs, expected, 0.0)
        contestants[name] = lambda measured=measured: measured(calls)  # type: ignore[misc]

    def copy() -> None:
        bench.arrays.copy(outs[1], inputs[0])

    contestants["copy"] = lambda: bench.seconds(copy, bench.plan.calls)
    found = alternate(contestants, bench.plan.rounds)
    ours, moved = found["auto"], round(2 * (num - 1) / num * nbytes)
    attained = moved / ours.median / (nbytes / found["copy"].median)
    neighbours = {name: samples.median for name, samples in found.items() if name != "auto"}
    return Figure(
        f"{_NAME}, auto", num, nbytes, _FLOAT.name, ours.median, ours.quartiles, moved, attained,
        neighbours,
    )  # fmt: skip


def _auto(bench: _MultiGpuBench, inputs: Sequence[Any], outs: Sequence[Any]) -> Measured:
    return lambda calls: bench.seconds(lambda: kernels.all_reduce(inputs, out=outs), calls)


def _protocols(bench: _MultiGpuBench) -> dict[str, Rival]:
    """Return the protocols that these GPUs can run, each by name."""
    ranks = tuple(range(len(bench.devices)))
    found: dict[str, Route] = {}
    # Memory of some pools is closed to other GPUs, and these run on what arrays() allocates.
    probes = cuda_arrays.locate(_NAME, bench.empty(1))
    is_open = all(bench.driver.is_open(checks.address(one.array)) for one in probes)
    if is_open and all(all(row) for row in bench.reach):
        for name in ("one_shot", "two_shot", "ring"):
            found[name] = Route(flag_all_reduce.PROTOCOLS[name], ranks, True)
    elif is_open and flag_selection.ring_order(bench.reach) is not None:
        found["ring"] = flag_selection.choose(bench.reach, bench.devices, 1, "ring")
    found["staged"] = Route(flag_all_reduce.staged, ranks, False, "host")
    return {name: _by(route) for name, route in found.items()}


def _by(route: Route) -> Rival:
    def rival(bench: _MultiGpuBench, inputs: Sequence[Any], outs: Sequence[Any]) -> Measured:
        placed = cuda_arrays.locate(_NAME, [*inputs, *outs])
        addresses = [checks.address(one.array) for one in placed]
        num = len(inputs)
        streams = [one.stream for one in placed[:num]]
        job = AllReduceCall(
            addresses[:num], addresses[num:], placed[0].array.size, _FLOAT, ReduceOp.SUM, streams
        )
        return lambda calls: bench.seconds(lambda: bench.team.all_reduce(job, route), calls)

    return rival


_TORCH = "torch nccl"


def _rivals(
    bench: _MultiGpuBench, stack: contextlib.ExitStack, absent: list[Figure]
) -> dict[str, Rival]:
    """Return NCCL and PyTorch, where they are; else say why not."""
    found: dict[str, Rival] = {}
    num = len(bench.devices)
    try:
        nccl = Nccl([Device("cuda", device) for device in bench.devices])
    except DeviceError as error:
        absent.append(_missing(f"{_NAME}, nccl", num, str(error)))
    else:
        found["nccl"] = lambda bench, inputs, outs: (
            lambda calls: bench.seconds(lambda: nccl.all_reduce(inputs, ReduceOp.SUM, outs), calls)
        )
    peer, python = registry.ON_GPUS[_TORCH], registry.default_python()
    if registry.version_of(peer, python) is None:
        why = f"{peer.package} is not installed ({peer.how_to_get})"
        absent.append(_missing(f"{_NAME}, {_TORCH}", num, why))
        return found
    try:
        worker = stack.enter_context(Worker(_TORCH, python, num, peers=registry.ON_GPUS))
        worker.ask(1, _FLOAT.name, 1)
    except WorkerLostError as error:
        absent.append(_missing(f"{_NAME}, {_TORCH}", num, str(error)))
        return found
    found[_TORCH] = _asked(worker)
    return found


def _asked(worker: Worker) -> Rival:
    def rival(bench: _MultiGpuBench, inputs: Sequence[Any], outs: Sequence[Any]) -> Measured:
        def measured(calls: int) -> float:
            answer = worker.ask(int(inputs[0].size), _FLOAT.name, calls)
            if answer.wrong:
                raise DeviceError(f"{_NAME}, {_TORCH}: {answer.wrong} elements are wrong")
            return answer.seconds

        return measured

    return rival


def _missing(name: str, num_gpus: int, why: str) -> Figure:
    note = f"not measured: {why}"
    return Figure(name, num_gpus, 0, _FLOAT.name, None, None, 0, None, {}, note)
