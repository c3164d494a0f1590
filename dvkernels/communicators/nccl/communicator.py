"""NCCL communicator of the replicas on GPUs, through CuPy; an optional dependency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from dvkernels.communicators.base import Communicator, Workers
from dvkernels.communicators.local import Local
from dvkernels.communicators.nccl.comms import NcclComms
from dvkernels.communicators.single import Single
from dvkernels.communicators.workers.consistency import fingerprint_of
from dvkernels.devices import cuda
from dvkernels.devices.array_spec import Spec, spec
from dvkernels.devices.device import Device
from dvkernels.errors import AlgorithmError, DeviceError, DvKernelsError
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
    """Communicator of ranks on one GPU each, over NCCL.

    Parameters
    ----------
    devices : sequence of Device
        One GPU per rank of this process, all different.
    nccl : module, optional
        ``cupy.cuda.nccl``, or a double of it.
    arrays : ArrayLibrary, optional
        Allocates GPU arrays; by default the array library of this process.
    workers : Workers, optional
        The processes that hold ranks; each constructs this at the same time. Ranks are numbered
        worker by worker. By default this process alone.
    fallback : Communicator, optional
        Communicator of the same ranks for calls that NCCL does not carry out; by default the
        kernels of this process.

    Raises
    ------
    AlgorithmError
        A rank is not on a GPU, or two ranks share one.
    DeviceError
        NCCL is not installed, or fails.
    CollectiveTimeoutError
        NCCL does not connect the workers in time. All of these are raised on all workers.

    Notes
    -----
    The kernels of this package carry out whatever NCCL does differently from this package's
    contract: host arrays, half types (NCCL rounds at every hop, except for sums in symmetric
    windows, which CuPy does not register), minimum and maximum of floats (NCCL may lose NaN),
    complex numbers, dtypes and reductions that NCCL lacks, arrays that are not contiguous on some
    worker.

    NCCL waits without a deadline for a rank that does not call. Before each call the workers
    therefore agree on it, in one control round on the host. The call is enqueued on the current
    streams, and the host does not wait for the GPUs. ``NcclComms`` aborts a call that hangs.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        nccl: Any = None,
        arrays: cuda.ArrayLibrary | None = None,
        *,
        workers: Workers | None = None,
        fallback: Communicator | None = None,
    ) -> None:
        self._workers: Workers = Single() if workers is None else workers
        offer = self._offer(devices, nccl, arrays)
        offers: list[_Offer] = self._workers.exchange(offer)
        _check(offers)
        starts = partition.starts([len(each.gpus) for each in offers])
        self.size = starts[-1]
        self._ranks = range(starts[self._workers.rank], starts[self._workers.rank + 1])
        self._fallback: Communicator = Local(self.size, "auto") if fallback is None else fallback
        self._comms = NcclComms(
            self._nccl, self._arrays, self._devices, self._workers, self._ranks, self.size,
            offers[0].unique_id,
        )  # fmt: skip

    def _offer(
        self, devices: Sequence[Device], nccl: Any, arrays: cuda.ArrayLibrary | None
    ) -> _Offer:
        """Return this worker's GPUs, or the error that all workers are to raise."""
        try:
            named = ", ".join(map(str, devices))
            if {device.kind for device in devices} != {"cuda"} or len({*devices}) < len(devices):
                raise AlgorithmError(
                    f"cross_device_ops='nccl' needs a GPU of its own for each replica; got "
                    f"{named}; 'auto' and 'direct' serve CPU devices and replicas that share a GPU"
                )
            self._nccl = _load() if nccl is None else nccl
            self._arrays = cuda.arrays() if arrays is None else arrays
            self._devices = [device.index for device in devices]
            gpus = [self._arrays.identity(device) for device in self._devices]
            unique_id = self._nccl.get_unique_id() if self._workers.rank == 0 else None
        except DvKernelsError as error:
            return _Offer(error, [], None)
        except Exception as error:
            text = f"cross_device_ops='nccl': {type(error).__name__}: {error}"
            return _Offer(DeviceError(text), [], None)
        return _Offer(None, gpus, unique_id)

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Reduce into new arrays, or into ``out``."""
        first, results = values[0], [] if out is None else list(out)
        if not _reduces(op, first.dtype):
            return self._fallback.all_reduce(values, op, out)
        is_supported = self._can_move([*values, *results])
        if is_supported and out is None:  # before the vote: raises if the GPU has no memory
            results = self._new([first.shape] * len(values), first.dtype)
        call_terms = "nccl.all_reduce", op.name.lower(), spec(first)
        if not self._agreed(is_supported, *call_terms):
            return self._fallback.all_reduce(values, op, out)
        codes = self._codes(op, first.dtype)

        def call(k: int, comm: Any, stream: int) -> None:
            sent, received = values[k].data.ptr, results[k].data.ptr
            comm.allReduce(sent, received, first.size, *codes, stream)

        self._comms.launch(fingerprint_of(*call_terms).text, call)
        return self._divide(results, op)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Reduce into one new array, on the first device of each worker."""
        first = values[0]
        if not _reduces(op, first.dtype):
            return self._fallback.reduce(values, op)
        if self._workers.size > 1:  # so that all workers get the same bits
            return self.all_reduce(values, op)[0]
        if not self._can_move(values):
            return self._fallback.reduce(values, op)
        (result,) = self._new([first.shape], first.dtype)
        codes = self._codes(op, first.dtype)

        def call(k: int, comm: Any, stream: int) -> None:
            comm.reduce(values[k].data.ptr, result.data.ptr, first.size, *codes, 0, stream)

        self._comms.launch("nccl.reduce", call)
        return self._divide([result], op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Reduce each rank's part into a new array; uneven parts by one reduction each."""
        first = values[0]
        if not _reduces(op, first.dtype):
            return self._fallback.reduce_scatter(values, op)
        parts, trailing = partition.parts(len(first), self.size), first.shape[1:]
        is_supported, results = self._can_move(values), []
        if is_supported:
            own = (parts[rank] for rank in self._ranks)
            results = self._new([(stop - start, *trailing) for start, stop in own], first.dtype)
        call_terms = "nccl.reduce_scatter", op.name.lower(), spec(first)
        if not self._agreed(is_supported, *call_terms):
            return self._fallback.reduce_scatter(values, op)
        codes, row_size = self._codes(op, first.dtype), math.prod(trailing)
        are_even = len(first) % self.size == 0

        def call(k: int, comm: Any, stream: int) -> None:
            sent, received = values[k].data.ptr, results[k].data.ptr
            if are_even:
                comm.reduceScatter(sent, received, results[k].size, *codes, stream)
                return
            for root, (start, stop) in enumerate(parts):
                address = sent + start * row_size * first.itemsize
                comm.reduce(address, received, (stop - start) * row_size, *codes, root, stream)

        self._comms.launch(fingerprint_of(*call_terms).text, call)
        return self._divide(results, op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Concatenate into a new array for each rank; uneven parts by one broadcast each."""
        first = values[0]
        if axis != 0:
            return self._fallback.all_gather(values, axis)
        trailing = first.shape[1:]
        call_terms = "nccl.all_gather", Spec(("any", *trailing), first.dtype)
        own = [int(self._can_move(values)), *(len(value) for value in values)]
        answers = self._workers.agree(own, *call_terms)
        if not all(is_supported for is_supported, *_ in answers):
            return self._fallback.all_gather(values, axis)
        lengths = [length for _, *own in answers for length in own]
        results = self._new([(sum(lengths), *trailing)] * len(values), first.dtype)
        self._workers.agree([], "nccl.all_gather allocated")
        row_nbytes = math.prod(trailing) * first.itemsize
        counts = [length * row_nbytes for length in lengths]
        code, are_even = self._nccl.NCCL_UINT8, len({*lengths}) == 1

        def call(k: int, comm: Any, stream: int) -> None:
            sent, received = values[k].data.ptr, results[k].data.ptr
            if are_even:
                comm.allGather(sent, received, counts[0], code, stream)
                return
            for root, (start, stop) in enumerate(itertools.pairwise(partition.starts(counts))):
                comm.broadcast(sent, received + start, stop - start, code, root, stream)

        self._comms.launch(fingerprint_of(*call_terms).text, call)
        return results

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the root's value for every rank."""
        like = values[root - self._ranks[0]] if root in self._ranks else values[0]
        is_supported, results = self._can_move(values), []
        if is_supported:
            results = self._new([like.shape] * len(values), like.dtype)
        call_terms = "nccl.broadcast", f"from {root}", spec(like)
        if not self._agreed(is_supported, *call_terms):
            return self._fallback.broadcast(values, root)
        code = self._nccl.NCCL_UINT8

        def call(k: int, comm: Any, stream: int) -> None:
            sent, received = values[k].data.ptr, results[k].data.ptr
            comm.broadcast(sent, received, like.nbytes, code, root, stream)

        self._comms.launch(fingerprint_of(*call_terms).text, call)
        return results

    def _agreed(self, is_supported: bool, verb: str, *terms: Any) -> bool:
        """Return whether NCCL can carry out the call on all workers, once all have asked for it."""
        return all(
            supported for (supported,) in self._workers.agree([int(is_supported)], verb, *terms)
        )

    def _can_move(self, values: Sequence[Any]) -> bool:
        """Return whether all values are contiguous arrays on the device of their rank."""
        return all(
            not isinstance(value, np.ndarray)
            and value.flags.c_contiguous
            and self._arrays.device_of(value) == device
            for value, device in zip(values, itertools.cycle(self._devices))
        )

    def _codes(self, op: Reduction, dtype: np.dtype[Any]) -> tuple[int, int]:
        assert isinstance(op, ReduceOp)
        return getattr(self._nccl, _DTYPES[dtype.name]), getattr(self._nccl, _OPS[op])

    def _new(self, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
        pairs = zip(self._devices, shapes, strict=False)  # a single result is on the first device
        return [self._arrays.empty(device, shape, dtype) for device, shape in pairs]

    def _divide(self, results: list[Any], op: Reduction) -> list[Any]:
        """Divide the sums of a MEAN in place; the mean is rounded once."""
        for result in results if op is ReduceOp.MEAN else ():
            with self._arrays.at(self._arrays.device_of(result)):
                np.divide(result, result.dtype.type(self.size), out=result)
        return results


class _Offer(NamedTuple):
    """One worker's contribution to the construction of an NCCL communicator."""

    problem: DvKernelsError | None
    gpus: list[str]  # identities that are unique across hosts
    unique_id: Any  # the ncclUniqueId; worker 0 creates it


def _check(offers: Sequence[_Offer]) -> None:
    """Raise the same error on all workers unless NCCL can connect their GPUs."""
    users: dict[str, list[str]] = {}
    for worker, offer in enumerate(offers):
        if offer.problem is not None:
            where = f"on worker {worker}: " if len(offers) > 1 else ""
            raise type(offer.problem)(f"{where}{offer.problem}")
        for k, gpu in enumerate(offer.gpus):
            users.setdefault(gpu, []).append(f"replica {k} of worker {worker}")
    for gpu, sharing in users.items():
        if len(sharing) > 1:
            raise AlgorithmError(
                f"cross_device_ops='nccl' needs a GPU of its own for each replica; GPU {gpu} is "
                f"that of {' and '.join(sharing)}: give each worker other devices, such as "
                f"devices=[f'cuda:{{resolver.local_rank}}'], or use 'auto'"
            )


def _reduces(op: Reduction, dtype: np.dtype[Any]) -> bool:
    """Return whether NCCL's result is the one that this package promises."""
    may_lose_nan = op in (ReduceOp.MIN, ReduceOp.MAX) and dtype.kind == "f"
    return op in _OPS and dtype.name in _DTYPES and not may_lose_nan


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
