"""Double of CuPy and its NCCL, for ranks of workers that are threads of one process.

A collective runs once all ranks have enqueued it. Calls that differ are refused, and a missing call
is waited for until the communicator is aborted.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import Counter, defaultdict

import numpy as np

import dvkernels as dv

PATIENCE_SECONDS = 60


class OnDevice(np.ndarray):
    """Array with CuPy's ``data.ptr``, on one device per rank."""

    device = 0

    @property
    def data(self):
        return type("Pointer", (), {"ptr": self.ctypes.data})


def placed(arrays):
    """Return views of the arrays, one on each device."""
    made = []
    for device, array in enumerate(arrays):
        one = np.asarray(array).view(OnDevice)
        one.device = device
        made.append(one)
    return made


def gpus(count):
    return [dv.Device("cuda", k) for k in range(count)]


def can_move(nccl, values):
    """Replacement for ``Nccl._can_move``, which takes these arrays for host arrays."""
    return all(
        isinstance(value, OnDevice)
        and value.flags.c_contiguous
        and value.device == nccl._devices[k % len(nccl._devices)]
        for k, value in enumerate(values)
    )


class Arrays:
    """Double of the array library (``cuda.ArrayLibrary``) of one worker, with its own GPUs."""

    def __init__(self, library=None, worker=0):
        self._library, self._worker = library, worker
        self.here = threading.local()

    def identity(self, device):
        return f"{self._worker}.{device}"

    def empty(self, device, shape, dtype, stream=None):
        made = np.empty(shape, dtype).view(OnDevice)
        made.device = device
        return made

    def device_of(self, array):
        return array.device

    def current(self, device):
        return type("Stream", (), {"ptr": 1000 + device})

    @contextlib.contextmanager
    def at(self, device, stream=None):
        before = getattr(Library.here, "gpu", None)
        Library.here.gpu = self.identity(device)
        yield
        Library.here.gpu = before

    def event(self, device):
        return Event(self._library, self.identity(device))


class Event:
    def __init__(self, library, gpu):
        self._library, self._gpu = library, gpu

    def record(self, stream):
        assert Library.here.gpu == self._gpu, "a default stream is that of the current device"
        self._wanted = self._library.enqueued[self._gpu]

    @property
    def done(self):
        return self._library.completed[self._gpu] >= self._wanted


class Failed(Exception):
    """Double of CuPy's NcclError."""


class Library:
    NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_UINT32, NCCL_INT64, NCCL_UINT64 = range(6)
    NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN = range(4)
    here = threading.local()  # groups and current devices belong to a thread

    def __init__(self, *, is_patient=True):
        self.is_patient = is_patient  # groupEnd waits until all ranks have called
        self.num_groups, self.is_lost = 0, False
        self.enqueued, self.completed = Counter(), Counter()  # number of groups by GPU
        self.joined = defaultdict(dict)  # by unique id: ranks
        self.changed = threading.Condition()

    def get_unique_id(self):
        return bytes([len(self.joined) + 1] * 128)

    def NcclCommunicator(self, size, unique_id, rank):
        assert self.here.group is not None, "ranks are created in groups only"
        made = Rank(self, size, unique_id, rank, self.here.gpu)
        self.here.group.append(made)
        return made

    def groupStart(self):
        assert getattr(self.here, "group", None) is None
        self.here.group = []

    def groupEnd(self):
        group, self.here.group = self.here.group, None
        with self.changed:
            made = [rank for rank in group if isinstance(rank, Rank)]
            for rank in made:
                assert rank.rank not in self.joined[rank.unique_id]
                self.joined[rank.unique_id][rank.rank] = rank
            called = {}
            for rank, *call in (one for one in group if not isinstance(one, Rank)):
                called.setdefault(rank, []).append(call)
            for rank, calls in called.items():
                rank.groups.append(calls)
                self.enqueued[rank.gpu] += 1
            for rank in called:
                self.run(rank)
            self.num_groups += bool(called)
            self.changed.notify_all()
            self.wait(lambda: all(len(self.joined[r.unique_id]) == r.size for r in made))
            if self.is_patient:
                self.wait(
                    lambda: all(self.completed[r.gpu] >= self.enqueued[r.gpu] for r in called)
                )
            if any(rank.is_aborted for rank in called):
                raise Failed("aborted")

    def wait(self, happened):
        assert self.changed.wait_for(happened, PATIENCE_SECONDS), "NCCL waits without end"

    def run(self, rank):
        """Run the calls that all ranks have enqueued."""
        ranks = sorted(self.joined[rank.unique_id].values(), key=lambda one: one.rank)
        if len(ranks) < rank.size or not all(one.groups for one in ranks):
            return
        for calls in zip(*(one.groups.pop(0) for one in ranks), strict=True):
            carry_out(calls)
        self.completed.update(one.gpu for one in ranks)


class Rank:
    def __init__(self, library, size, unique_id, rank, gpu):
        assert gpu is not None, "the device of the rank is current"
        self.library, self.size, self.rank, self.gpu = library, size, rank, gpu
        self.unique_id, self.is_aborted, self.groups = unique_id, False, []

    def check_async_error(self):
        if self.library.is_lost:
            raise Failed("remote process exited")

    def abort(self):
        with self.library.changed:
            self.is_aborted = True
            self.library.completed[self.gpu] = self.library.enqueued[self.gpu]
            self.library.changed.notify_all()

    def __getattr__(self, verb):
        def call(*args):
            group, gpu = Library.here.group, Library.here.gpu
            assert group is not None, "NCCL is called in groups only"
            assert not self.is_aborted
            assert gpu == self.gpu, "the device of the rank is current"
            assert args[-1] == 1000 + int(gpu.split(".")[1]), "on the current stream of its device"
            group.append((self, verb, *args))

        return call


TYPES = ("i1", "u1", "i4", "u4", "i8", "u8", None, "f4", "f8")
COMBINE = (np.add, np.multiply, np.maximum, np.minimum)


def carry_out(calls):
    """Carry out one collective of all ranks."""
    terms = {(verb, *rest[:-1]) for verb, _, _, *rest in calls}
    assert len(terms) == 1, f"the ranks called differently: {terms}"
    verb, _, _, count, kind, *rest = calls[0]
    taken = count * len(calls) if verb == "reduceScatter" else count
    sent = [view(call[1], taken, TYPES[kind]).copy() for call in calls]
    if verb == "broadcast":
        results = dict.fromkeys(range(len(calls)), sent[rest[0]])
    elif verb == "allGather":
        results = dict.fromkeys(range(len(calls)), np.concatenate(sent))
    else:
        total = sent[0]
        for other in sent[1:]:
            with np.errstate(all="ignore"):
                total = COMBINE[rest[0]](total, other)
        results = {
            "allReduce": lambda: dict.fromkeys(range(len(calls)), total),
            "reduce": lambda: {rest[1]: total},
            "reduceScatter": lambda: dict(enumerate(np.split(total, len(calls)))),
        }[verb]()
    for rank, result in results.items():
        view(calls[rank][2], len(result), TYPES[kind])[:] = result


def view(address, count, dtype):
    nbytes = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype)
