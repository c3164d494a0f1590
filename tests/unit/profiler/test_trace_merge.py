"""Traces of several workers: one clock on a host, a bounded offset between hosts."""

from __future__ import annotations

import json
import os

import pytest

from dvkernels.cli import main
from dvkernels.errors import TraceError
from dvkernels.profiler import trace_merge


def with_clock(path, target, shift_ns, **changed):
    """Write a trace again as by another clock, which is ahead."""
    content = json.loads(path.read_text())
    about = content["otherData"]
    about |= {"clock": "another", "clock_base_ns": about["clock_base_ns"] + shift_ns, **changed}
    target.write_text(json.dumps(content))
    return target


def test_workers_of_a_host_have_one_clock(traces, tmp_path):
    merged = tmp_path / "run.json"
    offsets = trace_merge.merge([*reversed(traces)], merged)
    assert offsets == [(0, 0, 0, "same clock"), (1, 0, 0, "same clock")]
    content = json.loads(merged.read_text())
    events = content["traceEvents"]
    assert [each["worker"] for each in content["otherData"]["workers"]] == [0, 1]
    reduces = {0: [], 1: []}
    for event in events:
        if event.get("name") == "reduce":
            reduces[event["pid"]].append(event)
    # No worker ends a collective before the other has begun it.
    assert len(reduces[0]) == len(reduces[1]) == 10
    for one, other in zip(reduces[0], reduces[1], strict=True):
        assert one["ts"] <= other["ts"] + other["dur"]
        assert other["ts"] <= one["ts"] + one["dur"]
    arrows = [event for event in events if event.get("name") == "last worker to arrive"]
    assert len(arrows) == 2 * 10
    assert {(arrow["ph"], arrow["pid"]) for arrow in arrows} >= {("s", 0), ("f", 1)} or {
        (arrow["ph"], arrow["pid"]) for arrow in arrows
    } >= {("s", 1), ("f", 0)}


def test_between_hosts_the_offset_lies_within_its_uncertainty(traces, tmp_path, capsys):
    shift = 5_000_000_123
    other = with_clock(traces[1], tmp_path / "other.json", shift)
    status = main.main(["trace", str(traces[0]), str(other), "-o", str(tmp_path / "m"), "--json"])
    assert status == 0
    found = json.loads(capsys.readouterr().out)["workers"][1]
    assert found["method"] == "collectives"
    assert abs(found["offset_ns"] - shift) <= found["uncertainty_ns"]
    ages = [event["ts"] for event in json.loads((tmp_path / "m").read_text())["traceEvents"]
            if "ts" in event]  # fmt: skip
    assert 0 <= min(ages) < max(ages) < 4e6  # in one timeline, not 5 s apart


def test_without_common_collectives_the_system_clocks_serve(traces, tmp_path):
    one, two = (json.loads(path.read_text()) for path in traces)
    two["traceEvents"] = []
    (tmp_path / "two").write_text(json.dumps(two))
    other = with_clock(tmp_path / "two", tmp_path / "other.json", 10**12)
    found = trace_merge.merge([traces[0], other], tmp_path / "m")[1]
    assert (found.uncertainty_ns, found.method) == (None, "system time")
    about = one["otherData"], two["otherData"]
    system = [each["clock_base_ns"] - each["unix_ns"] for each in about]
    assert found.offset_ns == 10**12 + system[1] - system[0]


def test_other_files_are_refused_and_the_output_stays(traces, tmp_path, capsys):
    output = tmp_path / "m"
    output.write_text("kept")
    (tmp_path / "bad").write_text("[]")
    with pytest.raises(TraceError, match="bad is not a trace of one worker"):
        trace_merge.merge([tmp_path / "bad"], output)
    with pytest.raises(TraceError, match=r"workers \[0, 0\]"):
        trace_merge.merge([traces[0], traces[0]], output)
    assert main.main(["trace", str(tmp_path / "none"), "-o", str(output)]) == 2
    assert "none" in capsys.readouterr().err
    assert output.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["bad", "m"]
