"""The communicator of GPUs that NVIDIA's NCCL connects, through CuPy; never required."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.local import Local
from dvkernels.devices import cuda
from dvkernels.devices.base import Device
from dvkernels.errors import AlgorithmError, DeviceError
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.schedules import partition

__all__: list[str] = []

_DTYPES = {
    "int8": "NCCL_INT8", "uint8": "NCCL_UINT8", "int32": "NCCL_INT32", "uint32": "NCCL_UINT32",
    "int64": "NCCL_INT64", "uint64": "NCCL_UINT64", "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
}  # fmt: skip
_OPS = {
    ReduceOp.SUM: "NCCL_SUM",
    ReduceOp.MEAN: "NCCL_SUM",
    ReduceOp.PROD: "NCCL_PROD",
    ReduceOp.MIN: "NCCL_MIN",
    ReduceOp.MAX: "NCCL_MAX",
}


@final
class Nccl:
    """Ranks on GPUs of their own, between which NCCL carries the bytes.

    Parameters
    ----------
    devices : sequence of Device
        One GPU per rank, each once.
    nccl : module, optional
        CuPy's; another one with its names.
    arrays : Arrays, optional
        What makes arrays; that of this process if not given.

    Raises
    ------
    AlgorithmError
        The ranks are not on GPUs, or share one: NCCL wants one each.
    DeviceError
        NCCL is not installed.

    Notes
    -----
    What NCCL does otherwise than this library promises is left to the library's own kernels:
    arrays of the host, half types (NCCL rounds at every hop), minimum and maximum of floats (it
    may lose NaN), complex numbers, dtypes and reductions that it does not know, arrays that are
    not dense.
    """

    def __init__(
        self, devices: Sequence[Device], nccl: Any = None, arrays: cuda.Arrays | None = None
    ) -> None:
        named = ", ".join(map(str, devices))
        if {device.kind for device in devices} != {"cuda"} or len({*devices}) < len(devices):
            raise AlgorithmError(
                f"cross_device_ops='nccl' needs a GPU of its own for each replica; got {named}; "
                f"'auto' and 'direct' serve CPU devices and replicas that share a GPU"
            )
        self.size = len(devices)
        self._nccl = _load() if nccl is None else nccl
        self._arrays = cuda.arrays() if arrays is None else arrays
        self._devices = [device.index for device in devices]
        self._ranks = self._nccl.NcclCommunicator.initAll(self._devices)
        self._kernels = Local(self.size, "auto")

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays, or into ``out``."""
        given = [] if out is None else list(out)
        if not self._can_reduce([*values, *given], op):
            return self._kernels.all_reduce(values, op, out)
        results = given or self._new([value.shape for value in values], values[0].dtype)

        def call(rank: int, comm: Any, stream: int) -> None:
            sent, received = values[rank].data.ptr, results[rank].data.ptr
            comm.allReduce(sent, received, values[rank].size, *self._codes(values, op), stream)

        self._together(call)
        return self._divided(results, op)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array, on the first device."""
        if not self._can_reduce(values, op):
            return self._kernels.reduce(values, op)
        result = self._arrays.empty(self._devices[0], values[0].shape, values[0].dtype)

        def call(rank: int, comm: Any, stream: int) -> None:
            sent, count = values[rank].data.ptr, values[rank].size
            comm.reduce(sent, result.data.ptr, count, *self._codes(values, op), 0, stream)

        self._together(call)
        return self._divided([result], op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce each rank's part into a new array: one reduction a part, all in one group."""
        if not self._can_reduce(values, op):
            return self._kernels.reduce_scatter(values, op)
        parts = partition.parts(len(values[0]), self.size)
        rest = values[0].shape[1:]
        results = self._new([(stop - start, *rest) for start, stop in parts], values[0].dtype)
        row_nbytes = values[0].nbytes // max(1, len(values[0]))

        def call(rank: int, comm: Any, stream: int) -> None:
            for root, (start, _) in enumerate(parts):
                sent = values[rank].data.ptr + start * row_nbytes
                received, count = results[root].data.ptr, results[root].size
                comm.reduce(sent, received, count, *self._codes(values, op), root, stream)

        self._together(call)
        return self._divided(results, op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank: one broadcast a rank, all in one group."""
        if axis != 0 or not self._can_move(values):
            return self._kernels.all_gather(values, axis)
        length = sum(len(value) for value in values)
        shape = (length, *values[0].shape[1:])
        results = self._new([shape] * self.size, values[0].dtype)

        def call(rank: int, comm: Any, stream: int) -> None:
            place = results[rank].data.ptr
            for root, value in enumerate(values):
                code = self._nccl.NCCL_UINT8
                comm.broadcast(value.data.ptr, place, value.nbytes, code, root, stream)
                place += value.nbytes

        self._together(call)
        return results

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        if not self._can_move(values):
            return self._kernels.broadcast(values, root)
        results = self._new([values[root].shape] * self.size, values[root].dtype)

        def call(rank: int, comm: Any, stream: int) -> None:
            sent, received = values[rank].data.ptr, results[rank].data.ptr
            code = self._nccl.NCCL_UINT8
            comm.broadcast(sent, received, values[root].nbytes, code, root, stream)

        self._together(call)
        return results

    def _can_reduce(self, values: Sequence[Any], op: Reduction) -> bool:
        dtype = values[0].dtype
        keeps_nan = op in (ReduceOp.MIN, ReduceOp.MAX) and dtype.kind == "f"
        return op in _OPS and dtype.name in _DTYPES and not keeps_nan and self._can_move(values)

    def _can_move(self, values: Sequence[Any]) -> bool:
        """Return whether all lie dense on the device of their rank."""
        return all(
            not isinstance(value, np.ndarray)
            and value.flags.c_contiguous
            and self._arrays.device_of(value) == self._devices[k % self.size]
            for k, value in enumerate(values)
        )

    def _codes(self, values: Sequence[Any], op: Reduction) -> tuple[int, int]:
        assert isinstance(op, ReduceOp)
        dtype = getattr(self._nccl, _DTYPES[values[0].dtype.name])
        return dtype, getattr(self._nccl, _OPS[op])

    def _new(self, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
        pairs = zip(self._devices, shapes, strict=True)
        return [self._arrays.empty(device, shape, dtype) for device, shape in pairs]

    def _together(self, call: Callable[[int, Any, int], None]) -> None:
        """Make the calls of all ranks, which begin when the last has been made."""
        with self._group():
            for rank, comm in enumerate(self._ranks):
                device = self._devices[rank]
                with self._arrays.at(device):
                    call(rank, comm, self._arrays.current(device).ptr)

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()

    def _divided(self, results: list[Any], op: Reduction) -> list[Any]:
        """Divide sums in place where a mean was asked for: one rounding, as everywhere here."""
        for result in results if op is ReduceOp.MEAN else ():
            with self._arrays.at(self._arrays.device_of(result)):
                np.divide(result, result.dtype.type(self.size), out=result)
        return results


def _load() -> Any:
    cuda.require("cross_device_ops='nccl'")
    if cuda.is_simulated():
        raise DeviceError(
            "cross_device_ops='nccl' needs GPUs, and the simulator has none: use 'auto'"
        )
    from cupy.cuda import nccl

    if not nccl.available:
        raise DeviceError(
            "cross_device_ops='nccl': CuPy found no NCCL library: python -m pip install "
            "nvidia-nccl-cu13 (or nvidia-nccl-cu12), or use 'auto'"
        )
    return nccl
