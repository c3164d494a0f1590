"""Frame of a collective call on GPU arrays: checks, stream order and new result arrays.

A call locates its buffers, checks them, puts its work on one stream and orders the other streams by
events. The host does not wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dvkernels.devices import cuda, cuda_arrays, driver, interop, stream_order
from dvkernels.devices.array_spec import HostArray
from dvkernels.devices.cuda_arrays import order_streams
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.errors import DeviceError
from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import job

__all__ = ["NEW", "AllReduce", "Buffers", "Call"]

NEW: Any = object()  # as ``out``: allocate the results


class Call:
    """Collective call: the devices and streams of its arrays, and the stream of its work.

    ``verb`` is the function's name in error messages, ``stream`` the caller's argument.
    """

    def __init__(self, verb: str, stream: Any = None) -> None:
        cuda.require(verb)
        self.verb = verb
        self._stream = stream
        self._device_buffers: list[cuda_arrays.DeviceBuffer] = []
        self._names: list[str] = []
        self._is_of_jax = False

    def register(self, buffers: Any, verb: str = "", name: str = "replica") -> list[HostArray]:
        """Return buffers as NumPy descriptions, and order the work of this call with theirs."""
        found = cuda_arrays.locate(verb or self.verb, buffers, name)
        self._device_buffers += found
        self._names += (f"{name} {k}" for k in range(len(found)))
        self._is_of_jax = self._is_of_jax or any(map(interop.is_of_jax, buffers))
        return [buffer.array for buffer in found]

    @contextlib.contextmanager
    def ordered(self) -> Iterator[DeviceStream]:
        """Yield the stream to launch on: it waits for the buffers' streams, and they for it."""
        streams = dict.fromkeys(buffer.device_stream for buffer in self.device_buffers())
        work_stream, *others = streams
        if self.is_multi_gpu:
            self._check_peer_access(work_stream.device)
        if not others:
            yield work_stream
            self.settle([work_stream])
            return
        with cuda_arrays.in_one_capture(self.verb, streams):
            order_streams([(work_stream, other) for other in others])
            try:
                yield work_stream
            finally:
                order_streams([(other, work_stream) for other in others])
        self.settle([work_stream])

    def settle(self, work_streams: Iterable[DeviceStream]) -> None:
        """Let the host wait for the work if it reads arrays of JAX.

        JAX uses their memory again in the order of streams of its own, and takes results that are
        there.
        """
        if self._is_of_jax:
            for stream in work_streams:
                cuda_arrays.wait_on_host(stream)

    @property
    def is_multi_gpu(self) -> bool:
        """Whether the buffers lie on several GPUs."""
        return len({buffer.device for buffer in self._device_buffers}) > 1

    def device_buffers(self) -> list[cuda_arrays.DeviceBuffer]:
        """Return device, stream and description of each buffer, followed by those of ``out``."""
        streams = stream_order.per_buffer(self.verb, self._stream, len(self._device_buffers))
        if streams is None:
            return self._device_buffers
        pairs = zip(self._device_buffers, streams, strict=True)
        return [buffer._replace(stream=stream) for buffer, stream in pairs]

    def _check_peer_access(self, work_device: int) -> None:
        """Raise unless the GPU that does the work can access the memory of all arrays."""
        cuda_driver = driver.find()
        assert cuda_driver is not None  # it has located the buffers
        for name, buffer in zip(self._names, self._device_buffers, strict=True):
            if buffer.device == work_device:
                continue
            if not cuda_driver.open_peer(work_device, buffer.device):
                raise DeviceError(
                    f"{self.verb}: cuda:{work_device} does all the work, and has no peer access to "
                    f"cuda:{buffer.device}, where {name} lies; copy the buffers to one GPU "
                    "(all_reduce needs no peer access)"
                )
            if buffer.array.size and not cuda_driver.is_open(checks.address(buffer.array)):
                raise DeviceError(
                    f"{self.verb}: {name}, on cuda:{buffer.device}, lies in memory of a pool that "
                    f"is closed to cuda:{work_device}; allocate it with cudaMalloc, as CuPy does "
                    "by default, or copy the buffers to one GPU"
                )


class Buffers(Call):
    """Call on one array per replica, with results in ``out``, in new arrays or in place."""

    def __init__(self, verb: str, buffers: Any, out: Any, stream: Any) -> None:
        super().__init__(verb, stream)
        self.buffers = checks.as_sequence(verb, buffers)
        self._results: Any = self.buffers
        self.reads = self.register(self.buffers)
        self.out: list[HostArray] | None = None
        if out is not None:
            self._results = checks.as_sequence(verb, out, "out")
            self.out = self.register(self._results, name="out")

    @property
    def results(self) -> Any:
        """The arrays to return, once the work on them has been enqueued."""
        if self._is_of_jax and self.out is None:
            return cuda_arrays.finish(self._results, self.buffers)
        return self._results

    def new_results(self, shapes: Sequence[tuple[int, ...]]) -> list[HostArray]:
        """Allocate the results, of the library of the buffers; return their descriptions.

        Each lies on the GPU of its buffer; a single one on the GPU that does the work, the first.
        """
        streams = [buffer.device_stream for buffer in self.device_buffers()]
        originals = zip(self._device_buffers, self.buffers, streams, strict=False)
        made = [
            cuda_arrays.allocate_like(*original, shape)
            for shape, original in zip(shapes, originals, strict=False)
        ]
        self._results = [result for result, _ in made]
        return [described for _, described in made]

    def outputs(self, shapes: Sequence[tuple[int, ...]]) -> list[HostArray]:
        """Return the arrays to write to: ``out``, checked, or new ones."""
        if self.out is None:
            return self.new_results(shapes)
        return checks.outputs(self.verb, self.reads, self.out, shapes)


class AllReduce(Buffers):
    """All-reduce call whose arrays agree in shape and dtype and whose op GPUs support.

    Its results go to the buffers (``out`` is None), to new arrays (:data:`NEW`), or to ``out``.
    """

    def __init__(
        self, verb: str, buffers: Any, op: Any, out: Any, stream: Any, is_checked: bool = False
    ) -> None:
        self._makes_new = out is NEW
        super().__init__(verb, buffers, None if self._makes_new else out, stream)
        self.dtype = self.reads[0].dtype
        self.op = op
        if not is_checked:
            checks.arrays(verb, self.reads)
            self.op = job.check_op(verb, op, self.dtype)
        self.is_in_place = out is None

    def targets(self) -> list[HostArray]:
        """Return the arrays that receive the results; raise unless they are writable."""
        if self.is_in_place:
            checks.check_in_place(self.verb, self.reads)
            return self.reads
        if self._makes_new:
            return self.new_results([read.shape for read in self.reads])
        return checks.outputs_like(self.verb, self.reads, self.out)
