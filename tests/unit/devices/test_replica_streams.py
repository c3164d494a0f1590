"""Streams of replicas: the happens-before order, on doubles that record it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import pytest

from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.devices.stream_order import DeviceStream, wait_pairs


@dataclass
class Stream:
    ptr: int


class Timeline:
    """Streams as sets of work known to have happened; a wait merges two sets."""

    def __init__(self):
        self.past = {}
        self.current_of = {}
        self.numbers = itertools.count(100)

    def enqueue(self, stream, work):
        """Put work on a stream; return the work that certainly comes before it."""
        earlier = set(self.past.setdefault(stream, set()))
        self.past[stream].add(work)
        return earlier

    def order(self, pairs):
        for waiting, awaited in pairs:
            self.past.setdefault(waiting, set()).update(self.past.get(awaited, ()))

    def current_stream(self, device):
        return DeviceStream(device, self.current(device).ptr)

    # the methods of ArrayLibrary

    def stream(self, device, *, joins_default=False):
        assert joins_default, "Numba and PyTorch put their work on the default stream"
        return Stream(next(self.numbers))

    def current(self, device):
        return self.current_of.get(device, Stream(0))

    @contextlib.contextmanager
    def at(self, device, stream=None):
        earlier = self.current(device)
        self.current_of[device] = stream
        yield
        self.current_of[device] = earlier


@pytest.mark.parametrize("devices", [[0], [0, 0], [0, 0, 0], [0, 1], [0, 1, 0]])
def test_steps_rendezvous_and_callers_are_ordered(devices):
    timeline = Timeline()
    order = StreamOrder(devices, timeline, timeline.order)
    for caller in {*devices}:
        timeline.enqueue(timeline.current_stream(caller), ("made by the caller", caller))
    made_by_callers = {("made by the caller", device) for device in devices}
    with order.step():
        replica_streams = []
        for rank, device in enumerate(devices):
            with order.replica(rank):
                replica_streams.append(timeline.current_stream(device))
                assert made_by_callers <= timeline.enqueue(
                    replica_streams[-1], ("before the rendezvous", rank)
                )
        arrived = {("before the rendezvous", rank) for rank in range(len(devices))}

        def work_of_rendezvous(payloads):
            for device in {*devices}:
                stream = timeline.current_stream(device)
                assert stream not in replica_streams, "the rendezvous has streams of its own"
                assert arrived <= timeline.enqueue(stream, ("at the rendezvous", device))
            return payloads

        assert order.meet(work_of_rendezvous, "payloads") == "payloads"
        rendezvous_work = {("at the rendezvous", device) for device in devices}
        for rank, device in enumerate(devices):
            with order.replica(rank):
                assert rendezvous_work <= timeline.enqueue(
                    timeline.current_stream(device), ("after the rendezvous", rank)
                )
    final_work = {("after the rendezvous", rank) for rank in range(len(devices))}
    for device in {*devices}:
        assert final_work <= timeline.enqueue(timeline.current_stream(device), "after the step")


def test_replicas_do_not_wait_for_each_other_between_rendezvous():
    timeline = Timeline()
    order = StreamOrder([0, 0], timeline, timeline.order)
    with order.step():
        for rank in range(2):
            with order.replica(rank):
                assert not timeline.enqueue(timeline.current_stream(0), rank)


@pytest.mark.parametrize("devices", [[0], [0, 0], [0, 1]])
def test_items_of_a_map_and_the_callers_work_on_results_are_ordered(devices):
    timeline = Timeline()
    order = StreamOrder(devices, timeline, timeline.order)
    callers = [timeline.current_stream(device) for device in {*devices}]
    for caller in callers:
        timeline.enqueue(caller, ("given", caller))
    order.exchange()
    for rank, device in enumerate(devices):
        with order.replica(rank):
            own = timeline.current_stream(device)
            assert {("given", each) for each in callers} <= timeline.enqueue(own, ("item", rank))
    order.exchange()
    for caller in callers:
        items = {("item", rank) for rank in range(len(devices))}
        assert items <= timeline.enqueue(caller, ("used", caller))
    order.exchange()  # the memory of the results may be used again
    for rank, device in enumerate(devices):
        with order.replica(rank):
            own = timeline.current_stream(device)
            assert {("used", each) for each in callers} <= timeline.enqueue(own, ("next", rank))


def test_a_failed_rendezvous_is_ordered_too():
    timeline = Timeline()
    order = StreamOrder([0, 0], timeline, timeline.order)

    def work_of_rendezvous(payloads):
        timeline.enqueue(timeline.current_stream(0), "half done")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), order.step():
        order.meet(work_of_rendezvous, [])
    assert "half done" in timeline.enqueue(timeline.current_stream(0), "later")


def test_each_pair_of_streams_waits_once_and_none_for_itself():
    one, other = DeviceStream(0, 0), DeviceStream(1, 0)
    assert wait_pairs([one, one], [other, one, other]) == [(one, other)]
