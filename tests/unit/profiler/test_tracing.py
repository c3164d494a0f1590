"""Traces: spans by replica, written atomically, and no cost when tracing is off."""

from __future__ import annotations

import json
import os

import fork_server
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import ContextError
from dvkernels.profiler import tracing


def recorded(path):
    """Return the spans of a file by name, and the names of the lanes."""
    events = json.loads(path.read_text())["traceEvents"]
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


def test_spans_above_the_limit_are_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracing, "_MOST_SPANS", 3)
    with dv.MirroredStrategy(["cpu:0"]) as strategy, dv.profiler.trace(tmp_path / "t.json"):
        for _ in range(5):
            strategy.run(lambda: None)
    assert len(recorded(tmp_path / "t.json")[0]["run"]) == 3
    assert "2 later ones were left out" in caplog.text


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
