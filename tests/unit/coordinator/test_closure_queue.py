"""Closure queue of workers that may be lost for good: which calls fail, and who repeats one."""

from __future__ import annotations

import contextvars

import pytest

from dvkernels.coordinator.closure import Closure
from dvkernels.coordinator.closure_queue import ClosureQueue
from dvkernels.errors import CallCancelledError, ContextError, WorkerLostError


def closure_of(number):
    return Closure(number, int, (), {}, False, False, contextvars.copy_context())


@pytest.fixture
def queue():
    return ClosureQueue("the strategy", 10.0)


def put(queue, count):
    closures = [closure_of(number) for number in range(count)]
    for closure in closures:
        queue.put(closure)
    return closures


def test_calls_that_no_worker_is_left_to_make_raise_in_join(queue):
    first, *others = put(queue, 3)
    queue.leave(0, {0}, WorkerLostError("all are lost"))
    with pytest.raises(WorkerLostError, match="all are lost"):
        queue.join()
    assert isinstance(first.error, WorkerLostError)
    assert all(isinstance(each.error, CallCancelledError) for each in others)
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="schedule of the strategy: all are lost"):
            queue.put(closure_of(3))
    queue.join()  # nothing is left


def test_a_call_scheduled_while_the_last_worker_leaves_raises(queue, monkeypatch):
    def leaving():
        monkeypatch.undo()
        queue.leave(0, {0}, WorkerLostError("all are lost"))

    monkeypatch.setattr(queue, "_cancel_if_closed", leaving)
    with pytest.raises(WorkerLostError):
        queue.put(closure_of(0))


def test_workers_that_leave_a_closed_queue_are_not_lost(queue):
    (closure,) = put(queue, 1)
    queue.close("its coordinator was closed", 1)
    queue.leave(0, {0}, WorkerLostError("all are lost"))
    queue.join()
    assert isinstance(closure.error, CallCancelledError)
    with pytest.raises(ContextError, match="was closed"):
        queue.put(closure_of(1))


def test_a_call_that_has_lost_a_worker_is_for_the_others(queue):
    (closure,) = put(queue, 1)
    workers = {0, 1}
    assert queue.take(0, workers, 0.0) is closure
    queue.put_back(0, workers, closure)
    assert queue.take(0, workers, 0.0) is None
    assert queue.take(1, workers, 0.0) is closure
    queue.put_back(1, workers, closure)
    assert queue.take(0, workers, 0.0) is closure  # it has lost all, and is made again
    queue.put_back(0, workers, closure)
    workers.discard(1)
    assert queue.take(0, workers, 0.0) is closure
