"""Traces: spans by replica, written atomically, and no cost when tracing is off."""

from __future__ import annotations

import _thread
import json
import os
import sys
import time
import types

import fork_server
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import ContextError
from dvkernels.profiler import tracing


def events_of(path):
    return json.loads(path.read_text())["traceEvents"]


def recorded(path):
    """Return the spans of a file by name, and the names of the lanes."""
    events = events_of(path)
    spans = {}
    for event in events:
        if event["ph"] == "X":
            spans.setdefault(event["name"], []).append(event)
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return spans, lanes


def contains(outer, inner):
    return (
        outer["tid"] == inner["tid"]
        and outer["ts"] <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    )


def test_the_spans_of_a_step_are_in_the_lane_of_their_replica(tmp_path):
    path = tmp_path / "trace.json"
    data = dv.Dataset.from_arrays(np.arange(12.0)).batch(4)
    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:
        with dv.profiler.trace(path):
            for batch in strategy.distribute_dataset(data):
                strategy.run(
                    lambda rows: dv.get_replica_context().all_reduce("sum", rows.sum()), (batch,)
                )
            dv.Checkpoint(number=1).save(tmp_path / "saved")
            dv.Checkpoint(number=2).restore(tmp_path / "saved")
        strategy.run(lambda: None)  # after the end
    spans, lanes = recorded(path)
    counts = {name: len(found) for name, found in spans.items()}
    assert counts == {
        "next": 3, "run": 9, "all_reduce": 9, "reduce": 3, "save": 1, "write": 1, "restore": 1
    }  # fmt: skip
    for run in spans["run"]:
        assert lanes[run["tid"]] == f"replica {run['args']['replica']}"
        assert sum(contains(run, one) for one in spans["all_reduce"]) == 1
    for one in spans["reduce"]:
        assert sum(contains(whole, one) for whole in spans["all_reduce"]) == 1
    assert all(event["dur"] >= 0 for found in spans.values() for event in found)
    assert tracing.active is None


def test_a_failed_program_writes_its_trace_and_a_failed_trace_keeps_the_old_file(tmp_path):
    path = tmp_path / "trace.json"
    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        with pytest.raises(ZeroDivisionError), dv.profiler.trace(path):
            strategy.run(lambda: 1 / 0)
        spans, _ = recorded(path)
        assert len(spans["run"]) == 2
        before = path.read_text()
        trace = dv.profiler.trace(path)
        tracing.active.add("odd", "", 0, {"value": object()})  # JSON cannot represent it
        with pytest.raises(TypeError):
            trace.close()
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["trace.json"]


def test_bad_paths_and_a_second_trace_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        dv.profiler.trace(tmp_path / "missing" / "trace.json")
    with pytest.raises(IsADirectoryError, match="name a file"):
        dv.profiler.trace(tmp_path)
    refused = pytest.raises(ContextError, match=r"one\.json; end it first")
    with dv.profiler.trace(tmp_path / "one.json"), refused:
        dv.profiler.trace(tmp_path / "two.json")
    assert os.listdir(tmp_path) == ["one.json"]


def test_of_more_events_than_the_ring_holds_the_latest_are_kept(tmp_path, caplog):
    with dv.profiler.trace(tmp_path / "t.json", max_events=3):
        for number in range(5):
            with dv.profiler.range(str(number)):
                pass
    assert recorded(tmp_path / "t.json")[0].keys() == {"2", "3", "4"}
    assert "2 earlier ones were left out" in caplog.text
    for bad in (0, True, "many"):
        with pytest.raises((TypeError, ValueError), match="max_events"):
            dv.profiler.trace(tmp_path / "t.json", max_events=bad)


def test_an_open_trace_is_written_at_exit_but_not_by_a_forked_child(tmp_path):
    program = """
import os, sys
import dvkernels as dv
dv.profiler.trace(sys.argv[1])
dv.OneDeviceStrategy("cpu:0").run(lambda: None)
if os.fork() == 0:
    dv.OneDeviceStrategy("cpu:0").run(lambda: None)
    sys.exit()
os.wait()
"""
    path = tmp_path / "t.json"
    fork_server.run(program, path).check_returncode()
    assert len(recorded(path)[0]["run"]) == 1
    assert os.listdir(tmp_path) == ["t.json"]


def test_collectives_and_writes_say_what_they_move(tmp_path):
    path = tmp_path / "t.json"
    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.zeros(1000), aggregation="sum", name="weight")

        def step():
            dv.get_replica_context().all_reduce("sum", np.ones(1000, np.float32))
            dv.get_replica_context().all_reduce_async("sum", np.ones(8)).wait()
            weight.assign_add(np.ones(1000))

        with dv.profiler.trace(path):
            strategy.run(step)
            weight.assign(np.ones(1000))
    spans, _ = recorded(path)
    for one in spans["all_reduce"]:
        about = one["args"]
        assert about["call"] == "all_reduce(sum, float32[1000])"
        assert (about["bytes"], about["dtype"], about["algorithm"]) == (4000, "float32", "direct")
    calls = {one["args"]["call"].partition("(")[0]: one["args"] for one in spans["reduce"]}
    assert calls.keys() == {"all_reduce", "all_reduce_async", "Variable.assign_add"}
    assert calls["all_reduce"]["moved_bytes"] == 2 * 2 * 4000
    assert 0 < calls["all_reduce"]["attained"] <= 1
    assert {one["args"]["call"] for one in spans["wait"]} == {"all_reduce_async(sum, float64[8])"}
    for one in spans["write"]:
        assert one["args"] == {"variables": ["weight"], "bytes": 16000, "dtype": "float64"}
    assert len(spans["write"]) == 2
    counters = {e["name"]: e["args"] for e in events_of(path) if e["ph"] == "C"}
    assert counters["memory"]["variables"] >= 16000
    assert counters.keys() >= {"resident memory", "processor time"}


def test_arrows_lead_from_the_last_replica_to_those_that_waited(tmp_path):
    path = tmp_path / "t.json"
    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:

        def step(late):
            replica = dv.get_replica_context()
            if replica.replica_id_in_sync_group == late:
                while sum(request is not None for request in replica._step._requests) < 2:
                    time.sleep(0.001)
            replica.barrier()

        with dv.profiler.trace(path):
            strategy.run(step, (2,))
            strategy.run(step, (0,))
    spans, lanes = recorded(path)
    arrows = [event for event in events_of(path) if event["ph"] in "sf"]
    ends = {}
    for arrow in arrows:
        ends.setdefault(arrow["id"], {})[arrow["ph"]] = lanes[arrow["tid"]]
    assert sorted((end["s"], end["f"]) for end in ends.values()) == [
        ("replica 0", "replica 1"), ("replica 0", "replica 2"),
        ("replica 2", "replica 0"), ("replica 2", "replica 1"),
    ]  # fmt: skip
    for arrow in arrows:  # each end lies in a collective of its lane
        assert any(
            span["tid"] == arrow["tid"]
            and span["ts"] <= arrow["ts"] <= span["ts"] + span["dur"] + 1e-3
            for span in spans["barrier"]
        )


def test_runs_name_their_strategy_and_reads_of_aggregates_are_spans(tmp_path):
    path = tmp_path / "t.json"
    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        with strategy.scope():
            modes = {"synchronization": "on_read", "aggregation": "mean"}
            loss = dv.Variable(np.zeros(10), name="loss", **modes)
            weight = dv.Variable(0.0)
        with dv.profiler.trace(path):
            strategy.run(loss.read_value)  # the own copy of each
            loss.read_value()
            weight.read_value()
    spans, _ = recorded(path)
    assert {run["args"]["strategy"] for run in spans["run"]} == {"MirroredStrategy(cpu:0, cpu:0)"}
    about = {"variables": ["loss"], "bytes": 80, "dtype": "float64"}
    assert [read["args"] for read in spans["read"]] == [about]


def test_threads_that_python_does_not_know_count_as_those_of_libraries(tmp_path):
    path, stop = tmp_path / "t.json", []

    def spin():
        while not stop:
            pass

    with dv.profiler.trace(path):
        usage = tracing.active._threads
        _thread.start_new_thread(spin, ())
        try:
            while not any(usage.report()["library_thread_seconds"]):
                time.sleep(0.01)
        finally:
            stop.append(True)
    about = json.loads(path.read_text())["otherData"]
    assert about["cores"] >= 1
    assert len(about["thread_seconds"]) >= 1
    assert about["thread_seconds"] == sorted(about["thread_seconds"], reverse=True)


def test_ranges_nest_in_each_thread(tmp_path):
    path = tmp_path / "t.json"
    outer = dv.profiler.range("outer")

    @dv.profiler.range("inner")
    def inner(depth):
        return depth and inner(depth - 1)

    def step():
        with outer, outer:
            inner(1)

    open_at_the_end = dv.profiler.range("open")
    # The outermost begins without a trace: it is not recorded.
    with outer, dv.profiler.trace(path), dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        strategy.run(step)
        open_at_the_end.__enter__()
    open_at_the_end.__exit__(None, None, None)
    spans, _ = recorded(path)
    assert {name: len(found) for name, found in spans.items()} == {"outer": 4, "inner": 4, "run": 2}
    for inside in spans["inner"]:
        assert sum(contains(whole, inside) for whole in spans["outer"]) == 2
    with pytest.raises(TypeError, match="range: the name is a string"):
        dv.profiler.range(3)


def test_the_spans_are_nvtx_ranges_too(tmp_path, monkeypatch):
    calls = []

    class Domain:
        def __init__(self, name):
            assert name == "dvkernels"

        def get_event_attributes(self, message):
            return message

        def push_range(self, attributes):
            calls.append(attributes)

        def pop_range(self):
            calls.append("pop")

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(Domain=Domain))
    forward = dv.profiler.range("forward")
    with dv.profiler.trace(tmp_path / "t.json", nvtx=True), forward:
        dv.OneDeviceStrategy("cpu:0").run(lambda: dv.get_replica_context().barrier())
    pops = ["pop"] * 4
    assert calls == ["forward", "run", "barrier", "reduce", *pops]
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="needs the package nvtx"):
        dv.profiler.trace(tmp_path / "t.json", nvtx=True)
    assert os.listdir(tmp_path) == ["t.json"]
