"""The whole measurement of one GPU, beside its copies and its neighbours.

The limit is the bandwidth of a copy within the device, bytes read and written, taken in the same
run, in turn with the others. The host's clock is read after all work has ended; each figure is of
many calls. Before it is timed, each result is compared with NumPy's on random numbers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks.stopwatch import Samples, alternate, timed
from dvkernels.devices import cuda
from dvkernels.errors import DeviceError

__all__ = ["Figure", "MeasurementPlan", "all_reduce", "compare", "measure", "page"]

_MOST_BYTES_APART = 1e-2  # of bfloat16, whose sums are rounded once


class MeasurementPlan(NamedTuple):
    """How large, how many, how often."""

    nbytes: int = 256 << 20
    small_nbytes: int = 4 << 10
    replicas: tuple[int, ...] = (2, 4, 8)
    between_nbytes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
    rounds: int = 9
    calls: int = 20
    small_calls: int = 1000


class Figure(NamedTuple):
    """One line of the report: what took how long, and which part of the limit that is."""

    name: str
    replicas: int
    nbytes: int
    dtype: str
    seconds: float | None  # None: not measured
    quartiles: tuple[float, float] | None
    moved_nbytes: int
    attained: float | None  # of the copy's bandwidth
    neighbours: Mapping[str, float]  # seconds
    note: str = ""


class _OneGpuBench:
    """What all figures need: a device, its copy bandwidth, a clock that waits."""

    def __init__(self, device: int, plan: MeasurementPlan) -> None:
        self.arrays, self.device, self.plan = cuda.arrays(), device, plan
        self.rng = np.random.default_rng(0)
        self.source, self.target = (self.empty(plan.nbytes, np.dtype("u1")) for _ in range(2))

    def empty(self, count: int, dtype: Any) -> Any:
        return self.arrays.empty(self.device, (count,), np.dtype(dtype))

    def filled(self, count: int, dtype: Any, num: int) -> tuple[list[Any], list[Any]]:
        host = [self.rng.standard_normal(count).astype(dtype) for _ in range(num)]
        there = [self.empty(count, dtype) for _ in host]
        for one, content in zip(there, host, strict=True):
            self.arrays.copy(one, content)
        return there, host

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Return the seconds of one of so many calls, all of whose work has ended."""

        def all_calls() -> None:
            for _ in range(calls):
                call()
            self.arrays.current(self.device).synchronize()

        return timed(all_calls, 1) / calls

    def copy(self) -> None:
        self.arrays.copy(self.target, self.source)

    def contest(
        self, ours: Callable[[], object], others: Mapping[str, Callable[[], object]], calls: int
    ) -> dict[str, Samples]:
        """Return samples of ours, the copy's and the neighbours', taken in turn."""
        every = {"ours": ours, "copy": self.copy, **others}
        counts = {name: calls if name != "copy" else self.plan.calls for name in every}
        return alternate(
            {
                name: lambda call=call, count=counts[name]: self.seconds(call, count)  # type: ignore[misc]
                for name, call in every.items()
            },
            self.plan.rounds,
        )

    def figure(
        self,
        name: str,
        replicas: int,
        array: Any,
        moved: int,
        found: Mapping[str, Samples],
        note: str = "",
    ) -> Figure:
        copied = 2 * self.plan.nbytes / found["copy"].median
        ours = found["ours"]
        return Figure(
            name, replicas, array.nbytes, array.dtype.name, ours.median, ours.quartiles, moved,
            moved / ours.median / copied,
            {other: samples.median for other, samples in found.items() if other not in ("ours",)},
            note,
        )  # fmt: skip


def measure(device: int = 0, plan: MeasurementPlan | None = None) -> list[Figure]:
    """Return all figures; :class:`DeviceError` where there is no GPU, or a result is wrong."""
    bench = _OneGpuBench(device, plan or MeasurementPlan())
    figures = [
        _all_reduce(bench, count, dtype)
        for dtype in (np.dtype("f4"), np.dtype(ml_dtypes.bfloat16))
        for count in bench.plan.replicas
    ]
    figures.append(_small(bench))
    figures.append(_in_a_graph(bench))
    figures.append(_adam(bench))
    return figures


def all_reduce(device: int, plan: MeasurementPlan, replicas: int) -> Figure:
    """Return the figure of one float32 all-reduce."""
    return _all_reduce(_OneGpuBench(device, plan), replicas, np.dtype("f4"))


def _all_reduce(bench: _OneGpuBench, count: int, dtype: np.dtype[Any]) -> Figure:
    length = bench.plan.nbytes // dtype.itemsize
    buffers, host = bench.filled(length, dtype, count)
    kernels.all_reduce(buffers)
    expected = np.sum([one.astype("f4") for one in host], axis=0, dtype="f4")
    compare(
        bench.arrays, "all_reduce", buffers, expected, 1e-6 if dtype == "f4" else _MOST_BYTES_APART
    )
    neighbours = _neighbours(buffers) if dtype == "f4" else {}
    found = bench.contest(
        lambda: kernels.all_reduce(buffers, "mean"), neighbours, bench.plan.calls
    )  # a mean, so that repeated calls do not overflow
    return bench.figure("all_reduce", count, buffers[0], 2 * count * buffers[0].nbytes, found)


def _small(bench: _OneGpuBench) -> Figure:
    buffers, _ = bench.filled(bench.plan.small_nbytes // 4, np.dtype("f4"), 2)
    found = bench.contest(lambda: kernels.all_reduce(buffers, "mean"), {}, bench.plan.small_calls)
    moved = 4 * buffers[0].nbytes
    return bench.figure("all_reduce, a call from Python", 2, buffers[0], moved, found)


def _in_a_graph(bench: _OneGpuBench) -> Figure:
    name, nbytes = "all_reduce, in a CUDA graph", bench.plan.small_nbytes
    if cuda.is_simulated():
        note = "not measured: the simulator has no graphs"
        return Figure(name, 2, nbytes, "float32", None, None, 0, None, {}, note)
    import cupy

    buffers, _ = bench.filled(nbytes // 4, np.dtype("f4"), 2)
    kernels.all_reduce(buffers, "mean")
    stream, inside = cupy.cuda.Stream(non_blocking=True), 100
    with stream:
        stream.begin_capture()
        for _ in range(inside):
            kernels.all_reduce(buffers, "mean")
        graph = stream.end_capture()

    def replay() -> None:
        for _ in range(max(1, bench.plan.small_calls // inside)):
            graph.launch(stream)
        stream.synchronize()

    rounds = [
        timed(replay, 1) / max(1, bench.plan.small_calls // inside) / inside
        for _ in range(bench.plan.rounds)
    ]
    ours = Samples(tuple(rounds))
    return Figure(name, 2, nbytes, "float32", ours.median, ours.quartiles, 4 * nbytes, None, {})


def _adam(bench: _OneGpuBench) -> Figure:
    count, dtype = 4, np.dtype("f4")
    length = bench.plan.nbytes // dtype.itemsize // 4
    gradients, host = bench.filled(length, dtype, count)
    states = [[bench.empty(length, dtype) for _ in range(count)] for _ in range(3)]
    for one in (one for state in states for one in state):
        bench.arrays.copy(one, np.zeros(length, dtype))

    def step() -> None:
        kernels.cuda.optimizers.adam(
            [gradients], *([state] for state in states), step=1, learning_rate=1e-3
        )

    step()
    mean = np.mean(host, axis=0, dtype="f4")
    expected = -1e-3 * mean / (np.abs(mean) + 1e-8)
    compare(bench.arrays, "mean and Adam", states[0], expected, 1e-4)
    found = bench.contest(step, {}, bench.plan.calls)
    moved = (count + 3 + 3 * count) * gradients[0].nbytes
    return bench.figure("mean and Adam, fused", count, gradients[0], moved, found)


def compare(
    seam: cuda.ArrayLibrary, what: str, arrays: Sequence[Any], expected: Any, most_apart: float
) -> None:
    """Raise ``DeviceError`` unless all arrays hold what NumPy computes."""
    for replica, array in enumerate(arrays):
        found = np.empty(array.shape, array.dtype)
        seam.copy(found, array)
        apart = np.abs(found.astype("f4") - expected) / (np.abs(expected) + 1)
        if not apart.max(initial=0) <= most_apart:
            raise DeviceError(
                f"{what}: replica {replica} is {apart.max():g} from what NumPy computes, more than "
                f"{most_apart:g}; nothing is reported"
            )


def _neighbours(buffers: Sequence[Any]) -> dict[str, Callable[[], object]]:
    """Return what CuPy and PyTorch do for the same result, where they are."""
    found: dict[str, Callable[[], object]] = {}
    if cuda.is_simulated():
        return found
    import cupy

    def by_cupy() -> None:
        total = cupy.stack(buffers).mean(axis=0)
        for buffer in buffers:
            buffer[...] = total

    def by_adding() -> None:
        total = buffers[0] + buffers[1]
        for buffer in buffers[2:]:
            total += buffer
        total /= len(buffers)
        for buffer in buffers:
            buffer[...] = total

    found["cupy stack"], found["cupy add"] = by_cupy, by_adding
    torch: Any = sys.modules.get("torch") or _torch()
    if torch is not None and torch.cuda.is_available():
        tensors = [torch.from_dlpack(buffer) for buffer in buffers]
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)

        def by_torch() -> None:
            with torch.cuda.stream(stream):
                total = torch.stack(tensors).mean(0)
                for tensor in tensors:
                    tensor.copy_(total)

        def by_adding_in_torch() -> None:
            with torch.cuda.stream(stream):
                total = tensors[0] + tensors[1]
                for tensor in tensors[2:]:
                    total += tensor
                total /= len(tensors)
                for tensor in tensors:
                    tensor.copy_(total)

        found["torch stack"], found["torch add"] = by_torch, by_adding_in_torch
    return found


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def page(figures: Sequence[Figure], about: Mapping[str, str]) -> str:
    """Return the figures as a fragment of a Markdown page."""
    lines = [f"{name}: {value}  " for name, value in about.items()]
    lines += ["", "| what | replicas | bytes | dtype | time | of the copy | neighbours |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for one in figures:
        time = one.note or "not measured"
        if one.seconds is not None and one.quartiles is not None:
            low, high = one.quartiles
            time = f"{1e6 * one.seconds:.2f} us ({1e6 * low:.2f} to {1e6 * high:.2f})"
        part = "" if one.attained is None else f"{one.attained:.2f}"
        others = ", ".join(f"{name} {1e6 * each:.2f} us" for name, each in one.neighbours.items())
        lines.append(
            f"| {one.name} | {one.replicas} | {one.nbytes} | {one.dtype} | {time} | {part} | "
            f"{others} |"
        )
    return "\n".join(lines) + "\n"
