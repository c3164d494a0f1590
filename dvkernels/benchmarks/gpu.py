"""Benchmark of a single GPU, against a copy within the device, CuPy and PyTorch.

The limit is the bandwidth of the copy, in bytes read and written, measured in alternating rounds
with the others. The host's clock is read after all work has ended; each figure averages many calls.
Each result is compared with NumPy's on random numbers before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks.stopwatch import Samples, alternate, timed
from dvkernels.devices import cuda
from dvkernels.errors import DeviceError

__all__ = ["Figure", "MeasurementPlan", "all_reduce", "compare", "measure", "page"]

_BFLOAT16_TOLERANCE = 1e-2  # sums are rounded once


class MeasurementPlan(NamedTuple):
    """Sizes, replicas, rounds and calls of the GPU benchmarks."""

    nbytes: int = 256 << 20
    small_nbytes: int = 4 << 10
    replicas: tuple[int, ...] = (2, 4, 8)
    between_nbytes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
    rounds: int = 9
    calls: int = 20
    small_calls: int = 1000


class Figure(NamedTuple):
    """A line of the report: the time of a call, and the fraction of the limit that it reaches."""

    name: str
    replicas: int
    nbytes: int
    dtype: str
    seconds: float | None  # None: not measured
    quartiles: tuple[float, float] | None
    moved_nbytes: int
    attained: float | None  # fraction of the copy's bandwidth
    neighbours: Mapping[str, float]  # seconds of the copy and of other implementations
    note: str = ""


class _OneGpuBench:
    """State shared by all figures: the device, arrays for the copy, synchronized timing."""

    def __init__(self, device: int, plan: MeasurementPlan) -> None:
        self.arrays, self.device, self.plan = cuda.arrays(), device, plan
        self.rng = np.random.default_rng(0)
        self.source, self.target = (self.empty(plan.nbytes, np.dtype("u1")) for _ in range(2))

    def empty(self, count: int, dtype: Any) -> Any:
        return self.arrays.empty(self.device, (count,), np.dtype(dtype))

    def filled(self, count: int, dtype: Any, num: int) -> tuple[list[Any], list[Any]]:
        """Return ``num`` arrays of random numbers on the device, and their copies on the host."""
        host = [self.rng.standard_normal(count).astype(dtype) for _ in range(num)]
        on_device = [self.empty(count, dtype) for _ in host]
        for array, content in zip(on_device, host, strict=True):
            self.arrays.copy(array, content)
        return on_device, host

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Return the seconds per call, until all work of ``calls`` calls has ended."""

        def all_calls() -> None:
            for _ in range(calls):
                call()
            with self.arrays.at(self.device):
                self.arrays.current(self.device).synchronize()

        return timed(all_calls, 1) / calls

    def copy(self) -> None:
        self.arrays.copy(self.target, self.source)

    def compare_times(
        self, ours: Callable[[], object], others: Mapping[str, Callable[[], object]], calls: int
    ) -> dict[str, Samples]:
        """Return samples of our call, of the copy and of the others, in alternating rounds."""
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
        self, name: str, replicas: int, array: Any, moved: int, found: Mapping[str, Samples]
    ) -> Figure:
        ours, copied = found["ours"], 2 * self.plan.nbytes / found["copy"].median
        return Figure(
            name, replicas, array.nbytes, array.dtype.name, ours.median, ours.quartiles, moved,
            moved / ours.median / copied,
            {other: samples.median for other, samples in found.items() if other != "ours"},
        )  # fmt: skip


def measure(device: int = 0, plan: MeasurementPlan | None = None) -> list[Figure]:
    """Return all figures of one GPU.

    Raises
    ------
    DeviceError
        There is no GPU, or a result is wrong.
    """
    bench = _OneGpuBench(device, plan or MeasurementPlan())
    figures = [
        _all_reduce(bench, count, dtype)
        for dtype in (np.dtype("f4"), np.dtype(ml_dtypes.bfloat16))
        for count in bench.plan.replicas
    ]
    return [*figures, _small(bench), _in_a_graph(bench), _adam(bench)]


def all_reduce(device: int, plan: MeasurementPlan, replicas: int) -> Figure:
    """Return the figure of one float32 all-reduce."""
    return _all_reduce(_OneGpuBench(device, plan), replicas, np.dtype("f4"))


def _all_reduce(bench: _OneGpuBench, count: int, dtype: np.dtype[Any]) -> Figure:
    length = bench.plan.nbytes // dtype.itemsize
    buffers, host = bench.filled(length, dtype, count)
    kernels.all_reduce(buffers)
    expected = np.sum([one.astype("f4") for one in host], axis=0, dtype="f4")
    tolerance = 1e-6 if dtype == "f4" else _BFLOAT16_TOLERANCE
    compare(bench.arrays, "all_reduce", buffers, expected, tolerance)
    others = _other_libraries(buffers) if dtype == "f4" else {}
    found = bench.compare_times(
        lambda: kernels.all_reduce(buffers, "mean"), others, bench.plan.calls
    )  # a mean, so that repeated calls do not overflow
    return bench.figure("all_reduce", count, buffers[0], 2 * count * buffers[0].nbytes, found)


def _small(bench: _OneGpuBench) -> Figure:
    buffers, _ = bench.filled(bench.plan.small_nbytes // 4, np.dtype("f4"), 2)
    found = bench.compare_times(
        lambda: kernels.all_reduce(buffers, "mean"), {}, bench.plan.small_calls
    )
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
    replays = max(1, bench.plan.small_calls // inside)
    with stream:
        stream.begin_capture()
        for _ in range(inside):
            kernels.all_reduce(buffers, "mean")
        graph = stream.end_capture()

    def replay() -> None:
        for _ in range(replays):
            graph.launch(stream)
        stream.synchronize()

    rounds = range(bench.plan.rounds)
    ours = Samples(tuple(timed(replay, 1) / replays / inside for _ in rounds))
    return Figure(name, 2, nbytes, "float32", ours.median, ours.quartiles, 4 * nbytes, None, {})


def _adam(bench: _OneGpuBench) -> Figure:
    count, dtype = 4, np.dtype("f4")
    length = bench.plan.nbytes // dtype.itemsize // 4
    gradients, host = bench.filled(length, dtype, count)
    states = [[bench.empty(length, dtype) for _ in range(count)] for _ in range(3)]
    for array in (array for state in states for array in state):
        bench.arrays.copy(array, np.zeros(length, dtype))

    def step() -> None:
        kernels.cuda.optimizers.adam(
            [gradients], *([state] for state in states), step=1, learning_rate=1e-3
        )

    step()
    mean = np.mean(host, axis=0, dtype="f4")
    expected = -1e-3 * mean / (np.abs(mean) + 1e-8)
    compare(bench.arrays, "mean and Adam", states[0], expected, 1e-4)
    found = bench.compare_times(step, {}, bench.plan.calls)
    # Reads the gradients and one copy of the three states, writes every copy of them.
    moved = (count + 3 + 3 * count) * gradients[0].nbytes
    return bench.figure("mean and Adam, fused", count, gradients[0], moved, found)


def compare(
    library: cuda.ArrayLibrary, what: str, arrays: Sequence[Any], expected: Any, tolerance: float
) -> None:
    """Raise ``DeviceError`` unless all device arrays equal NumPy's result within the tolerance."""
    for replica, array in enumerate(arrays):
        found = np.empty(array.shape, array.dtype)
        library.copy(found, array)
        difference = np.abs(found.astype("f4") - expected) / (np.abs(expected) + 1)
        if not difference.max(initial=0) <= tolerance:
            raise DeviceError(
                f"{what}: replica {replica} differs from NumPy's result by {difference.max():g}, "
                f"more than {tolerance:g}; nothing is reported"
            )


def _other_libraries(buffers: Sequence[Any]) -> dict[str, Callable[[], object]]:
    """Return calls of CuPy and PyTorch with the same result, where they are installed."""
    if cuda.is_simulated():
        return {}
    import cupy

    found = _by_stacking_and_adding("cupy", cupy, buffers, contextlib.nullcontext)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return found
    if torch.cuda.is_available():
        tensors = [torch.from_dlpack(buffer) for buffer in buffers]
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)
        found |= _by_stacking_and_adding("torch", torch, tensors, lambda: torch.cuda.stream(stream))
    return found


def _by_stacking_and_adding(
    name: str,
    library: Any,
    arrays: Sequence[Any],
    on_stream: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, Callable[[], object]]:
    """Return the two ways to leave the mean in all arrays with a library's own functions."""

    def stack() -> None:
        with on_stream():
            total = library.stack(arrays).mean(0)
            for array in arrays:
                array[...] = total

    def add() -> None:
        with on_stream():
            total = arrays[0] + arrays[1]
            for array in arrays[2:]:
                total += array
            total /= len(arrays)
            for array in arrays:
                array[...] = total

    return {f"{name} stack": stack, f"{name} add": add}


def page(figures: Sequence[Figure], about: Mapping[str, str]) -> str:
    """Return the figures as a fragment of a Markdown page."""
    lines = [f"{name}: {value}  " for name, value in about.items()]
    lines += ["", "| what | replicas | bytes | dtype | time | of the copy | neighbours |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for figure in figures:
        time = figure.note or "not measured"
        if figure.seconds is not None and figure.quartiles is not None:
            low, high = figure.quartiles
            time = f"{1e6 * figure.seconds:.2f} us ({1e6 * low:.2f} to {1e6 * high:.2f})"
        part = "" if figure.attained is None else f"{figure.attained:.2f}"
        others = ", ".join(
            f"{name} {1e6 * seconds:.2f} us" for name, seconds in figure.neighbours.items()
        )
        lines.append(
            f"| {figure.name} | {figure.replicas} | {figure.nbytes} | {figure.dtype} | {time} | "
            f"{part} | {others} |"
        )
    return "\n".join(lines) + "\n"
