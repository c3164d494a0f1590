"""The work of a replica is measured without its waits for others."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

import dvkernels as dv
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.replicas import work_meter
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner

here = dv.get_replica_context


class Clock(threading.local):
    """A clock of each thread, which moves only when that thread works."""

    now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(work_meter, "perf_counter", made)
    return made


@pytest.fixture
def two():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


def test_what_collectives_take_is_no_work(two, clock):
    meter = two._runner.measure_work()

    def in_merge_call(strategy):
        clock.work(100)

    def step():
        own = here().replica_id_in_sync_group
        clock.work(1 + own)
        here().all_reduce("sum", 1.0)
        clock.work(10 + own)
        here().merge_call(in_merge_call)
        handle = here().all_reduce_async("sum", 1.0)
        clock.work(20)
        handle.wait()

    two.run(step)
    assert meter.reading == (1, (31, 33))
    two.run(step)
    assert meter.reading == (2, (62, 66))


def test_a_step_inside_merge_call_counts_for_itself(two, clock):
    meter = two._runner.measure_work()

    def step():
        clock.work(1)
        here().merge_call(lambda strategy: strategy.run(clock.work, (dv.PerReplica([5.0, 7.0]),)))

    two.run(step)
    assert meter.reading == (2, (6, 8))


def test_steps_that_fail_do_not_count(two, clock):
    meter = two._runner.measure_work()

    def dies():
        clock.work(1)
        here().all_reduce("sum", 1.0)
        raise KeyError

    with pytest.raises(KeyError):
        two.run(dies)
    assert meter.reading == (0, (0, 0))
    two.run(lambda: clock.work(1))
    assert meter.reading == (1, (1, 1))


def test_without_a_reader_no_clock_is_read(two, monkeypatch):
    monkeypatch.setattr(work_meter, "perf_counter", None)
    data = dv.Dataset.range(8).batch(4)
    for batch in two.distribute_dataset(data):
        two.run(lambda rows: here().all_reduce("sum", rows.sum()), (batch,))


def test_on_streams_some_steps_wait_for_the_work_that_they_measure(clock):
    """A replica on a GPU returns before its work is done."""
    stream = SimpleNamespace(ptr=0, queued=0)
    stream.__enter__ = stream.__exit__ = lambda *_: None

    class Arrays:
        """Array library of a GPU whose work is done when the host waits for it."""

        def stream(self, device, joins_default):
            def synchronize():
                clock.work(made.queued)
                made.queued = 0

            made = SimpleNamespace(ptr=1, queued=0, synchronize=synchronize)
            return made

        def current(self, device):
            return stream

        def at(self, device, stream=None):
            return threading.RLock()

    order = StreamOrder([0], Arrays(), lambda pairs: None)
    runner = StreamedRunner(Runner(1, "one GPU"), order)
    meter = runner.measure_work()

    def step(rendezvous, rank):
        order._own[0].queued += 3  # the work of this step

    readings = []
    for _ in range(14):
        runner.run(step, nested=False)
        readings.append(meter.reading)
    # The clock starts when the work of the steps before is done: 3, not 21.
    assert [reading.num_steps for reading in readings] == [1] * 7 + [2] * 7
    assert readings[-1].seconds == (6,)
    runner.close()
