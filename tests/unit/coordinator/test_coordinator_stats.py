"""Statistics of a coordinator: calls, requests, rows, and the staleness that writes have seen."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import WorkerLostError

SECONDS = 30


@pytest.fixture
def table(strategy):
    with strategy.scope():
        return dv.Variable(np.zeros((10, 2)), name="table")


def requests_of(coordinator):
    (server,) = coordinator.stats().servers
    return server.reads, server.rows_read, server.writes, server.rows_written


def test_requests_and_their_rows_are_counted(coordinator, table):
    adagrad = dv.optimizers.Adagrad(0.5)
    for request, expected in (
        (lambda: table.gather_rows([[3, 3], [1, 0]]), (1, 4, 0, 0)),
        (lambda: table.scatter_add([1, 2, 1], np.ones((3, 2))), (1, 4, 1, 3)),
        (lambda: table.assign(np.ones((10, 2))), (1, 4, 2, 13)),
        (table.read_value, (2, 14, 2, 13)),
        (lambda: adagrad.apply_gradients([(([4], np.ones((1, 2))), table)]), (2, 14, 3, 14)),
        (lambda: adagrad.apply_gradients([(np.ones((10, 2)), table)]), (2, 14, 4, 24)),
    ):
        coordinator.schedule(request).fetch()
        assert requests_of(coordinator) == expected


def test_staleness_is_the_number_of_writes_by_others_since_the_read(coordinator, table):
    has_read, others_wrote = threading.Event(), threading.Event()

    def step():
        table.gather_rows([1])
        has_read.set()
        assert others_wrote.wait(SECONDS)
        for _ in range(2):  # its own first write is not one by others
            table.scatter_add([1], np.ones((1, 2)))

    value = coordinator.schedule(step)
    assert has_read.wait(SECONDS)
    for _ in range(3):
        table.scatter_add([7], np.ones((1, 2)))  # by somebody who has read nothing
    others_wrote.set()
    value.fetch()
    (server,) = coordinator.stats().servers
    assert (server.staleness, server.max_staleness) == (3.0, 3)


def test_calls_are_counted_as_they_end(coordinator):
    begun, go_on, attempts = threading.Barrier(3), threading.Event(), []

    def wait():
        begun.wait(SECONDS)
        assert go_on.wait(SECONDS)

    def lost_once():
        attempts.append(None)
        if len(attempts) == 1:
            raise WorkerLostError("the connection was closed")

    def fail():
        raise ValueError("wrong")

    for call in (wait, wait, lost_once):
        coordinator.schedule(call)
    begun.wait(SECONDS)
    stats = coordinator.stats()
    assert (stats.running, stats.queued, stats.returned) == (2, 1, 0)
    go_on.set()
    coordinator.join()
    coordinator.schedule(fail)
    with pytest.raises(ValueError, match="wrong"):
        coordinator.join()
    stats = coordinator.stats()
    assert (stats.returned, stats.failed, stats.repeated) == (3, 1, 1)
    assert (stats.running, stats.queued) == (0, 0)
    assert str(stats).startswith("3 calls returned, 1 failed, 1 ran again")


def test_a_trace_has_the_counters(coordinator, table, tmp_path):
    with dv.profiler.trace(tmp_path / "run.json"):
        coordinator.schedule(table.gather_rows, ([1, 2],)).fetch()
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    counters = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    assert counters["rows of server 0"] == {"read": 2, "written": 0}
    assert {*counters} >= {"calls", "requests of server 0", "staleness of server 0"}
