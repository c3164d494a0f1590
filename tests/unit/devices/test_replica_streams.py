"""Streams of replicas: what happens before what, on doubles that keep count."""

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
    """Streams as sets of what is known to have happened: a wait joins them."""

    def __init__(self):
        self.past = {}
        self.current_of = {}
        self.numbers = itertools.count(100)

    def put(self, lane, mark):
        """Put work on a lane; return what comes before it for sure."""
        before = set(self.past.setdefault(lane, set()))
        self.past[lane].add(mark)
        return before

    def order(self, pairs):
        for waiting, awaited in pairs:
            self.past.setdefault(waiting, set()).update(self.past.get(awaited, ()))

    def lane(self, device):
        return DeviceStream(device, self.current(device).ptr)

    # the seam of arrays

    def stream(self, device, *, joins_default=False):
        assert joins_default, "Numba and PyTorch put their work on the default stream"
        return Stream(next(self.numbers))

    def current(self, device):
        return self.current_of.get(device, Stream(0))

    @contextlib.contextmanager
    def at(self, device, stream=None):
        before = self.current(device)
        self.current_of[device] = stream
        yield
        self.current_of[device] = before


@pytest.mark.parametrize("devices", [[0], [0, 0], [0, 0, 0], [0, 1], [0, 1, 0]])
def test_what_happens_before_what(devices):
    time = Timeline()
    order = StreamOrder(devices, time, time.order)
    for caller in {*devices}:
        time.put(time.lane(caller), ("made by the caller", caller))
    made = {("made by the caller", device) for device in devices}
    with order.step():
        own = []
        for rank, device in enumerate(devices):
            with order.replica(rank):
                own.append(time.lane(device))
                assert made <= time.put(own[-1], ("before the meeting", rank))
        brought = {("before the meeting", rank) for rank in range(len(devices))}

        def act(payloads):
            for device in {*devices}:
                lane = time.lane(device)
                assert lane not in own, "memory of a meeting is not that of a replica"
                assert brought <= time.put(lane, ("at the meeting", device))
            return payloads

        assert order.meet(act, "what was brought") == "what was brought"
        done = {("at the meeting", device) for device in devices}
        for rank, device in enumerate(devices):
            with order.replica(rank):
                assert done <= time.put(time.lane(device), ("after the meeting", rank))
    last = {("after the meeting", rank) for rank in range(len(devices))}
    for device in {*devices}:
        assert last <= time.put(time.lane(device), "after the step")


def test_replicas_do_not_wait_for_each_other_between_meetings():
    time = Timeline()
    order = StreamOrder([0, 0], time, time.order)
    with order.step():
        for rank in range(2):
            with order.replica(rank):
                assert not time.put(time.lane(0), rank)


def test_a_meeting_that_fails_is_ordered_all_the_same():
    time = Timeline()
    order = StreamOrder([0, 0], time, time.order)

    def act(payloads):
        time.put(time.lane(0), "half done")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), order.step():
        order.meet(act, [])
    assert "half done" in time.put(time.lane(0), "later")


def test_lanes_wait_for_others_once_and_never_for_themselves():
    one, other = DeviceStream(0, 0), DeviceStream(1, 0)
    assert wait_pairs([one, one], [other, one, other]) == [(one, other)]
