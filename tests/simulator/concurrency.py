"""Concurrent CUDA simulator: blocks, launches and streams run at the same time.

Numba's own simulator runs one block after another and one launch at a time, so a kernel that waits
for another block or another launch hangs in it. Inside ``concurrent()`` every CUDA thread of every
block is an operating-system thread, a stream is a queue with its own worker, and events order
streams. Arrays are not copied to a kernel and back, but shared with it.

It replaces private names of ``numba.cuda.simulator``; test_concurrency.py fails if they change.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda
from numba.cuda.simulator import api, kernel, kernelapi
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray, FakeWithinKernelCUDAArray

MOST_SECONDS = 60.0  # timeout of a barrier, and of a launch


class _Block:
    """Block: its dimensions, shared memory and barrier."""

    def __init__(self, grid_dim: Any, block_dim: Any, dynamic_nbytes: int) -> None:
        self.grid_dim, self.block_dim = kernelapi.Dim3(*grid_dim), kernelapi.Dim3(*block_dim)
        self.shared = kernelapi.FakeCUDAShared(dynamic_nbytes)
        num_threads = int(np.prod(block_dim))
        self.barrier = threading.Barrier(num_threads, timeout=MOST_SECONDS)
        self.votes = np.zeros(num_threads, np.bool_)


class _Thread(threading.Thread):
    """CUDA thread, run by a Python thread."""

    def __init__(self, run: Callable[[], object], block: _Block, index: Any, number: int) -> None:
        super().__init__(daemon=True, name="dvkernels-simulated")
        self._run_kernel, self.block, self.thread_id = run, block, number
        self.blockIdx = kernelapi.Dim3(*index)
        dim = block.block_dim
        x, rest = number % dim.x, number // dim.x
        self.threadIdx = kernelapi.Dim3(x, rest % dim.y, rest // dim.y)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run_kernel()
        except BaseException as error:
            self.error = error
            self.block.barrier.abort()


class _Module(kernelapi.FakeCUDAModule):
    """Module ``cuda`` of all running kernels; values of a block come from the current thread."""

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__((1, 1, 1), (1, 1, 1), 0)
        self._pause = pause

    def __getattr__(self, name: str) -> Any:
        # Host code runs at the same time as kernels, and sees the same ``cuda``.
        return getattr(cuda, name)

    gridDim = property(lambda self: _current_thread().block.grid_dim, lambda self, value: None)
    blockDim = property(lambda self: _current_thread().block.block_dim, lambda self, value: None)
    shared = property(lambda self: _current_thread().block.shared)

    def syncthreads(self) -> None:
        self._pause()
        _current_thread().block.barrier.wait()

    def _vote(self, value: Any) -> Any:
        block = _current_thread().block
        block.votes[_current_thread().thread_id] = bool(value)
        block.barrier.wait()
        votes = block.votes.copy()
        self.syncthreads()
        return votes

    def syncthreads_count(self, value: Any) -> int:
        return int(self._vote(value).sum())

    def syncthreads_and(self, value: Any) -> int:
        return int(self._vote(value).all())

    def syncthreads_or(self, value: Any) -> int:
        return int(self._vote(value).any())


def _current_thread() -> Any:
    return threading.current_thread()


class _ConfiguredKernel:
    """Kernel with its grid, which Numba's own simulator stores in the kernel itself."""

    def __init__(self, run: Callable[..., None], configuration: Any) -> None:
        self._run = run
        grid, block, *rest = configuration
        self._dims = kernel.normalize_kernel_dimensions(grid, block)
        self._stream = rest[0] if rest else 0
        self._dynamic_nbytes = rest[1] if len(rest) > 1 else 0

    def __call__(self, *args: Any) -> None:
        self._run(self._dims, self._stream, self._dynamic_nbytes, args)


class Streams:
    """Queues of all streams, with the errors of their work."""

    def __init__(self, module: _Module, pause: Callable[[], None]) -> None:
        self._module, self._pause = module, pause
        self._queues: dict[int, ThreadPoolExecutor] = {}
        self._last: dict[int, Future[Any]] = {}
        self._streams: list[Any] = []  # streams, kept so that their ids are not reused
        self._patching = threading.Lock()
        self._patched: list[tuple[dict[str, Any], str]] = []
        self.num_launches = 0

    def enqueue(self, stream: Any, work: Callable[[], object]) -> Future[Any]:
        key = id(stream) if stream else 0
        if key not in self._queues:
            self._queues[key] = ThreadPoolExecutor(1, f"dvkernels-stream-{key}")
            self._streams.append(stream)
        before = self._last.get(key)

        def run() -> object:
            if before is not None:
                before.result()  # after a failure, no later work of this stream runs
            self._pause()
            return work()

        self._last[key] = self._queues[key].submit(run)
        return self._last[key]

    def patch_globals(self, fn: Any) -> None:
        """Replace ``cuda`` in the globals of a function by that of running kernels, until close."""
        names = fn.__globals__
        with self._patching:
            self._patched += [(names, name) for name, value in names.items() if value is cuda]
            for found, name in self._patched:
                found[name] = self._module

    def launch(self, fn: Any, dims: Any, stream: Any, dynamic_nbytes: int, args: Any) -> None:
        self.num_launches += 1
        self.patch_globals(fn)
        arguments = [_kernel_argument(arg) for arg in args]
        self.enqueue(stream, lambda: self._run_grid(fn, dims, dynamic_nbytes, arguments))

    def _run_grid(self, fn: Any, dims: Any, dynamic_nbytes: int, args: list[Any]) -> None:
        grid_dim, block_dim = dims
        threads = []
        for index in np.ndindex(*grid_dim):
            block = _Block(grid_dim, block_dim, dynamic_nbytes)
            numbers = range(int(np.prod(block_dim)))
            threads += [_Thread(lambda: fn(*args), block, index, number) for number in numbers]
        for thread in threads:
            thread.start()
        end = time.monotonic() + MOST_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        for thread in threads:
            if thread.error and not isinstance(thread.error, threading.BrokenBarrierError):
                raise thread.error
        if any(thread.is_alive() or thread.error for thread in threads):
            raise TimeoutError(f"{fn.__name__} did not end within {MOST_SECONDS} s")

    def synchronize(self, stream: Any) -> None:
        self.enqueue(stream, lambda: None).result(MOST_SECONDS)

    def close(self) -> None:
        """Wait for all enqueued work; raise the first error."""
        try:
            for future in [*self._last.values()]:
                future.result(MOST_SECONDS)
        finally:
            for queue in self._queues.values():
                queue.shutdown()
            for names, name in self._patched:
                names[name] = cuda


def _kernel_argument(arg: Any) -> Any:
    if isinstance(arg, np.ndarray) and arg.ndim:
        arg = FakeCUDAArray(arg)
    return FakeWithinKernelCUDAArray(arg) if isinstance(arg, FakeCUDAArray) else arg


@contextlib.contextmanager
def concurrent(seed: int | None = None, most_delay: float = 0.002) -> Iterator[Streams]:
    """Run blocks, launches and streams of the simulator at the same time inside ``with``.

    With a ``seed``, launches and barriers are delayed at random by up to ``most_delay`` seconds.
    At the end, all streams are waited for, and the first error is raised.
    """
    draws = None if seed is None else random.Random(seed)

    def pause() -> None:
        if draws is not None and draws.random() < 0.25:
            time.sleep(draws.random() * most_delay)

    module = _Module(pause)
    streams = Streams(module, pause)

    def call(self: Any, *args: Any) -> Any:
        if isinstance(_current_thread(), _Thread):  # a device function
            streams.patch_globals(self.fn)
            return self.fn(*args)
        dims = self.grid_dim, self.block_dim
        return streams.launch(self.fn, dims, self.stream, self.dynshared_size, args)

    def configure(self: Any, configuration: Any) -> _ConfiguredKernel:
        return _ConfiguredKernel(lambda *launch: streams.launch(self.fn, *launch), configuration)

    def record(self: Any, stream: Any = 0) -> None:
        self.done = streams.enqueue(stream, lambda: None)

    def wait(self: Any, stream: Any = 0) -> None:
        if (done := getattr(self, "done", None)) is not None:
            streams.enqueue(stream, lambda: done.result(MOST_SECONDS))

    def synchronize_event(self: Any) -> None:
        self.done.result(MOST_SECONDS)

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (kernel.FakeCUDAKernel, "__call__", call),
            (kernel.FakeCUDAKernel, "__getitem__", configure),
            (api.stream, "synchronize", lambda self: streams.synchronize(self)),
            (api.Event, "record", record),
            (api.Event, "wait", wait),
            (api.Event, "synchronize", synchronize_event),
        ):
            assert hasattr(owner, name), (
                f"Numba's simulator has no {owner.__name__}.{name} any more"
            )
            stack.enter_context(mock.patch.object(owner, name, new))
        try:
            yield streams
        finally:
            streams.close()
