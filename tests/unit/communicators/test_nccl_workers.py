"""NCCL between the GPUs of several workers: the laws, and that no worker hangs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from nccl_double import Arrays, Library, can_move, gpus, placed
from threads_as_workers import Together, at_once, results, transports

import dvkernels as dv
from dvkernels.communicators import registry
from dvkernels.communicators.nccl import comms
from dvkernels.communicators.nccl.communicator import Nccl
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.errors import (
    AlgorithmError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DeviceError,
    WorkerLostError,
)
from dvkernels.strategies.base import Strategy
from dvkernels.testing import check_communicator

SUM = dv.ReduceOp.SUM


@pytest.fixture(autouse=True)
def _arrays_of_the_host_stand_for_those_of_gpus(monkeypatch):
    monkeypatch.setattr(Nccl, "_can_move", can_move)
    # The workers are threads here, which wait for each other inside NCCL.
    anybody = SimpleNamespace(acquire=lambda: None, release=lambda: None)
    monkeypatch.setattr(comms, "launcher", SimpleNamespace(launching=anybody))


class OfHost:
    """Communicator adapter: host arrays become views on one GPU per rank, and back."""

    def __init__(self, communicator, to=placed):
        self._communicator, self._to = communicator, to
        self.size = communicator.size

    def __getattr__(self, verb):
        def call(values, *args):
            moved = [self._to(arg) if isinstance(arg, list) else arg for arg in args]
            found = getattr(self._communicator, verb)(self._to(values), *moved)
            return bare(found) if isinstance(found, list) else found.view(np.ndarray)

        return call


def bare(arrays):
    return [array.view(np.ndarray) for array in arrays]


class Rest(OfHost):
    """Fallback adapter from GPU views to host arrays; records the calls."""

    def __init__(self, communicator):
        super().__init__(communicator, bare)
        self.asked = []

    def __getattr__(self, verb):
        call = super().__getattr__(verb)

        def noted(values, *args):
            self.asked.append((verb, values[0].dtype.name))
            found = call(values, *args)
            return placed(found) if isinstance(found, list) else placed([found])[0]

        return noted


def over(library, counts, rests=None):
    """Return a factory of each worker's communicator."""

    def make(workers, rest):
        if rests is not None:
            rest = rests[workers.rank] = Rest(rest)
        arrays = Arrays(library, workers.rank)
        return OfHost(
            Nccl(gpus(counts[workers.rank]), library, arrays, workers=workers, fallback=rest)
        )

    return make


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [2, 1]])
def test_the_laws_of_communicators(counts):
    library, rests = Library(), {}

    def make(size):
        return Together(size, counts=counts, over=over(library, counts, rests))

    check_communicator(make, sizes=[sum(counts)])
    for rest in rests.values():
        left = {dtype for verb, dtype in rest.asked if verb == "reduce_scatter"}
        assert left == {"float16", "bfloat16", "complex64", "bool", "float32", "float64"}
        assert not [one for one in rest.asked if one[0] == "broadcast"]
    assert library.num_groups > 100


def pair(library, timeout_seconds=20.0, num=1):
    """Return the communicators of two workers with so many GPUs each, and the workers."""
    workers = [WorkerGroup(transport) for transport in transports(2, timeout_seconds)]
    made = results(
        *(
            lambda one=one: Nccl(gpus(num), library, Arrays(library, one.rank), workers=one)
            for one in workers
        )
    )
    return made, workers


def ones(length=3):
    return placed([np.ones(length, "f4")])


def test_one_strided_array_takes_all_workers_to_the_fallback():
    library, rests = Library(), {}
    together = Together(2, counts=[1, 1], over=over(library, [1, 1], rests))
    values = [np.ones(3, "f4"), np.ones(6, "f4")[::2]]
    for verb in ("all_reduce", "reduce_scatter"):
        for found in getattr(together, verb)(values, SUM):
            assert (found == 2).all()
    for found in together.all_gather(values, 0):
        assert found.tolist() == [1.0] * 6
    assert library.num_groups == 0
    assert all(len(rest.asked) == 3 for rest in rests.values())


def test_workers_that_disagree_do_not_call_nccl():
    library = Library()
    (one, other), _ = pair(library)
    found = at_once(lambda: one.all_reduce(ones(3), SUM), lambda: other.all_reduce(ones(4), SUM))
    for error in found:
        assert isinstance(error, CollectiveMismatchError)
        assert "worker 0 called nccl.all_reduce(sum, float32[3])" in str(error)
        assert "worker 1 called nccl.all_reduce(sum, float32[4])" in str(error)
    assert library.num_groups == 0
    found = results(lambda: one.reduce(ones(), SUM), lambda: other.reduce(ones(), SUM))
    assert all((array == 2).all() for array in found)


@pytest.mark.parametrize(("verb", "arg"), [("all_reduce", SUM), ("all_gather", 0)])
def test_out_of_memory_on_one_worker_keeps_all_from_calling_nccl(verb, arg):
    library = Library()
    (one, other), workers = pair(library)

    def full(*_):
        raise DeviceError("no room")

    def fails():
        one._arrays.empty = full
        with pytest.raises(DeviceError, match="no room") as caught:
            getattr(one, verb)(ones(), arg)
        workers[0].announce(caught.value)

    _, error = at_once(fails, lambda: getattr(other, verb)(ones(), arg))
    assert isinstance(error, CollectiveMismatchError)
    assert "DeviceError: no room" in str(error)
    assert library.num_groups == 0


@pytest.mark.parametrize("is_patient", [False, True], ids=["on the GPU", "on the host"])
def test_a_call_that_hangs_is_aborted(is_patient):
    library = Library(is_patient=is_patient)
    (one, other), workers = pair(library, timeout_seconds=0.5)
    stuck = other._comms
    stuck._enqueue = lambda call: time.sleep(0)  # voted for, and never enqueued
    found = at_once(lambda: one.all_reduce(ones(), SUM), lambda: other.all_reduce(ones(), SUM))
    assert isinstance(found[0], CollectiveTimeoutError) == is_patient
    until = time.monotonic() + 20
    while not workers[1].has_ended and time.monotonic() < until:
        time.sleep(0.01)
    for call in (
        lambda: one.all_reduce(ones(), SUM),
        lambda: other.broadcast(ones(), 0),
        workers[0].barrier,
        lambda: workers[1].exchange(1),
    ):
        with pytest.raises(CollectiveTimeoutError, match=r"nccl.all_reduce\(sum, float32\[3\]\)"):
            call()
    assert library.joined[library_id(library)][0].is_aborted
    assert not [t for t in threading.enumerate() if t.name == "dvkernels-watch" and watches(t)]


def library_id(library):
    (only,) = library.joined
    return only


def watches(thread):
    thread.join(20)
    return thread.is_alive()


def test_a_worker_that_nccl_has_lost_is_reported_before_the_deadline():
    library = Library(is_patient=False)
    (one, other), workers = pair(library, timeout_seconds=600)
    other._comms._enqueue = lambda call: None
    results(lambda: one.all_reduce(ones(), SUM), lambda: other.all_reduce(ones(), SUM))
    library.is_lost = True
    until = time.monotonic() + 20
    while not workers[1].has_ended and time.monotonic() < until:
        time.sleep(0.01)
    for worker in workers:
        with pytest.raises(WorkerLostError, match="NCCL on worker 0 has lost another"):
            worker.barrier()


def test_a_call_that_fails_aborts_the_group():
    library = Library()
    (one, other), workers = pair(library, timeout_seconds=600)

    def fails(call):
        raise ValueError("unhandled cuda error")

    one._comms._enqueue = fails
    for error in at_once(
        lambda: one.all_reduce(ones(), SUM), lambda: other.all_reduce(ones(), SUM)
    ):
        assert isinstance(error, WorkerLostError)
    with pytest.raises(WorkerLostError, match="half-way: ValueError: unhandled cuda error"):
        workers[1].barrier()


# -- at the beginning ------------------------------------------------------------------------------


def begin(*makes, timeout_seconds=20.0):
    workers = [WorkerGroup(transport) for transport in transports(len(makes), timeout_seconds)]
    calls = (lambda make=make, one=one: make(one) for make, one in zip(makes, workers, strict=True))
    return at_once(*calls)


def test_a_gpu_of_two_workers_is_refused_on_both():
    library, same = Library(), Arrays(None, "both")
    make = lambda workers: Nccl(gpus(1), library, same, workers=workers)  # noqa: E731
    for error in begin(make, make):
        assert isinstance(error, AlgorithmError)
        assert "that of replica 0 of worker 0 and replica 0 of worker 1" in str(error)
    assert not library.joined


def test_a_worker_without_nccl_is_an_error_on_all():
    library = Library()

    def good(workers):
        return Nccl(gpus(1), library, Arrays(library, workers.rank), workers=workers)

    def of_cpu(workers):
        return Nccl([dv.Device("cpu", 0)], library, Arrays(), workers=workers)

    def breaks(workers):
        broken = Arrays()
        broken.identity = lambda device: 1 / 0
        return Nccl(gpus(1), library, broken, workers=workers)

    for bad, kind in ((of_cpu, AlgorithmError), (breaks, DeviceError)):
        for error in begin(good, bad):
            assert isinstance(error, kind)
            assert str(error).startswith("on worker 1: cross_device_ops='nccl'")
    assert not library.joined


@pytest.mark.parametrize("is_late", [False, True])
def test_nccl_that_does_not_connect_is_an_error_on_all(is_late, monkeypatch):
    monkeypatch.setattr("nccl_double.PATIENCE_SECONDS", 10)
    library = Library()

    def connect(*_):
        if is_late:
            time.sleep(3)
        raise OSError("no network")

    def make(workers):
        own = Library() if workers.rank else library
        own.NcclCommunicator = connect if workers.rank else library.NcclCommunicator
        return Nccl(gpus(1), own, Arrays(library, workers.rank), workers=workers)

    kind, text = (
        (CollectiveTimeoutError, r"workers \[0, 1\]")
        if is_late
        else (DeviceError, r"failed on worker 1 \(OSError: no network\)")
    )
    for error in begin(make, make, timeout_seconds=2.0):
        with pytest.raises(kind, match=text):
            raise error


def test_nccl_on_some_workers_only_is_an_error():
    def asks(workers):
        return registry.between_all(gpus(1), "NCCL", workers)

    def does_not(workers):
        return registry.between_all(gpus(1), "auto", workers)

    for error in begin(asks, does_not, asks):
        assert isinstance(error, AlgorithmError)
        assert "workers [0, 2] ask for it, and workers [1] do not" in str(error)


def test_a_strategy_without_gpus_is_an_error_on_all_workers():
    def make(workers):
        return Strategy(["cpu:0"], "nccl", workers=workers)

    for error in begin(make, make):
        assert isinstance(error, AlgorithmError)
        assert "on worker 0: cross_device_ops='nccl' needs a GPU of its own" in str(error)


@pytest.mark.parametrize("bytes_per_bucket", [None, 16])
def test_a_strategy_computes_the_same_over_nccl(monkeypatch, bytes_per_bucket):
    library, rests = Library(), {}

    def stand_in(devices, *, workers, fallback):
        return over(library, [len(devices)] * 2, rests)(workers, fallback)

    monkeypatch.setattr("dvkernels.communicators.nccl.communicator.Nccl", stand_in)

    def learn(strategy):
        def step():
            replica = dv.get_replica_context()
            k = replica.replica_id_in_sync_group
            gradients = [np.arange(3.0) + k, np.full((2, 2), k, "f4"), np.float16([k])]
            later = replica.all_reduce_async("mean", gradients)
            total.assign_add(replica.all_reduce("mean", gradients)[0])
            parts = replica.reduce_scatter("sum", np.arange(7) * k)
            rows = replica.all_gather(np.full((k + 1, 2), k))
            return later.wait(), parts, rows, replica.broadcast(np.float64(k), 3)

        with strategy, strategy.scope():
            total = dv.Variable(np.ones(3), aggregation="sum")
            found = strategy.local_results(strategy.run(step))
            ids = strategy.distribute_values_from_function(lambda one: one.replica_id_in_sync_group)
            return [*found], total.numpy(), strategy.reduce("sum", ids), strategy.gather(ids)

    def work(workers):
        return learn(Strategy(["cpu:0", "cpu:1"], "nccl", workers=workers,
                              bytes_per_bucket=bytes_per_bucket))  # fmt: skip

    (one, *same), (other, *also) = (result for result in begin(work, work))
    right, *alone = learn(dv.MirroredStrategy(["cpu:0"] * 4))
    np.testing.assert_equal([*one, *other], right)
    np.testing.assert_equal(same, alone)
    np.testing.assert_equal(also, alone)
    assert library.num_groups >= 6
