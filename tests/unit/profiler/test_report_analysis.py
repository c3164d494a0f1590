"""Analysis of traces: known answers for made ones, laws for those of small runs, and bad files."""

from __future__ import annotations

import json
import math
import random

import made_traces as made
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.cli import main
from dvkernels.errors import TraceError
from dvkernels.profiler import trace_merge
from dvkernels.profiler.report import (
    advice,
    analysis,
    arrivals,
    figures,
    timeline,
    trace_table,
)
from dvkernels.profiler.report.intervals import Intervals


def analysed(path):
    return analysis.analyse(trace_table.read(path))


def analysis_of(tmp_path, records, about=None):
    return analysed(made.write(tmp_path / "t.json", records, about))


def milliseconds(time):
    return {part: round(1e3 * s / time.num_steps, 6) for part, s in time.seconds.items()}


# -- intervals -------------------------------------------------------------------------------------


def test_intervals_are_sets_of_moments():
    draw = random.Random(0)
    for _ in range(100):
        sets = []
        for _ in range(2):
            begins = [draw.randrange(30) for _ in range(draw.randrange(6))]
            ends = [begin + draw.randrange(-1, 6) for begin in begins]
            moments = {t for b, e in zip(begins, ends, strict=True) for t in range(b, e)}
            sets.append((Intervals(begins, ends), moments))
        (one, first), (other, second) = sets
        begin, end = sorted(draw.randrange(40) for _ in range(2))
        assert one.covered(begin, end) == sum(begin <= t < end for t in first)
        both = one & other
        assert both.length == len(first & second)
        assert (both.ends[:-1] < both.begins[1:]).all()


# -- known answers ---------------------------------------------------------------------------------


def test_the_parts_of_a_step_are_found_and_add_up(tmp_path):
    found = analysis_of(tmp_path, made.steady(20))
    one, other = found.times
    assert (one.replica, other.replica) == (0, 1)
    assert (one.strategy, one.num_steps) == (made.STRATEGY, 19)  # the first is left out
    assert milliseconds(one) == {
        "compute": 2.5 + 0.5, "reduce": 1, "update": 0, "waiting": 2 + 0.5 + 0.5, "input": 2,
        "between steps": 0.5 + 0.5,
    }  # fmt: skip
    assert milliseconds(other) == {
        "compute": 4.5 + 1, "reduce": 1, "update": 0, "waiting": 0.5, "input": 2,
        "between steps": 0.5 + 0.5,
    }  # fmt: skip
    assert math.isclose(one.total, other.total)
    assert math.isclose(one.total, 19 * 0.010)


def test_optimizers_writes_and_reads_have_their_parts(tmp_path):
    records = made.steady(20, text="apply_gradients(mean, w)")
    for step in range(1, 21):
        t = 10.0 * step
        records += [
            made.span("write", "write", t + 7, t + 7.75, 1, variables=["w"]),  # in the reduction
            made.span("write", "write", t + 8.6, t + 8.85, 0, variables=["local"]),
            made.span("read", "read", t + 9.5, t + 9.9, 0, variables=["loss"], bytes=8),
        ]
    one, other = analysis_of(tmp_path, records).times
    parts = milliseconds(one)
    assert parts == {
        "compute": 2.5 + 0.25, "reduce": 0.4, "update": 1 + 0.25, "waiting": 3, "input": 2,
        "between steps": 0.6,
    }  # fmt: skip
    assert milliseconds(other)["update"] == 1
    assert math.isclose(sum(parts.values()), 10)


def test_the_late_replica_is_the_one_that_the_others_wait_for(tmp_path):
    found = analysis_of(tmp_path, made.steady(20)).lateness
    assert [(each.replica, each.num_meetings, each.num_last) for each in found] == [
        (1, 20, 20), (0, 20, 0)
    ]  # fmt: skip
    assert math.isclose(found[0].waited_seconds, 20 * 0.002)
    assert (found[0].worst_steps, found[1].worst_steps) == (1, 0)


def test_a_collective_that_a_replica_never_reached_is_no_meeting(tmp_path):
    records = [*made.steady(3), made.call(42, 43, 0, 4), made.run(41, 44, 0, 4)]
    found = analysis_of(tmp_path, records)
    assert [each.num_meetings for each in found.lateness] == [3, 3]


def test_strategies_of_one_name_count_their_steps_anew(tmp_path):
    later = [{**each, "ts": each["ts"] + 1e6} for each in made.steady(5)]
    found = analysis_of(tmp_path, made.steady(5) + later)
    assert [each.num_steps for each in found.times] == [9, 9]
    assert {each.num_meetings for each in found.lateness} == {10}
    assert found.times[0].seconds["compute"] < 1


def test_bandwidth_is_by_call_and_size(tmp_path):
    records = made.steady(9)
    records += [
        made.reduce(200, 201 + k, 0, 30 + k, "barrier()", bytes=0) for k in range(2)
    ] + [made.reduce(300, 302, 0, 40, "all_reduce(sum, float32[4000])", bytes=16000)]  # fmt: skip
    found = analysis_of(tmp_path, records).bandwidths
    assert [(each.verb, each.nbytes, each.num_calls) for each in found] == [
        ("all_reduce", 4000, 9), ("all_reduce", 16000, 1)
    ]  # fmt: skip
    assert math.isclose(found[0].algbw, 4000 / 0.001)
    assert (found[0].attained, found[1].attained) == (0.5, None)


def test_workers_wait_for_the_last_of_all(tmp_path):
    records = []
    for step in range(1, 8):
        t = 10.0 * step
        for worker, late in ((0, 0), (1, 3)):
            name, where = f"{made.JOB} on worker {worker}", {"worker": worker}
            common = {"strategy": name, **where}
            records += [
                made.call(t + 1 + late, t + 6, worker, step, **common),
                made.reduce(t + 1 + late, t + 5.5, worker, step, **common),
                made.run(t, t + 7, worker, step, **common),
            ]
    about = {"workers": [made.facts(0, num_workers=2), made.facts(1, num_workers=2)]}
    found = analysis_of(tmp_path, records, about)
    early, late = (milliseconds(each) for each in found.times)
    assert early == {
        "compute": 2, "reduce": 1.5, "update": 0, "waiting": 3.5, "input": 0, "between steps": 3
    }  # fmt: skip
    assert (late["compute"], late["waiting"]) == (5, 0.5)
    assert [each.replica for each in found.lateness] == [1, 0]
    assert math.isclose(found.bandwidths[0].median_seconds, 0.0015)
    assert found.bandwidths[0].num_calls == 7


def test_memory_keeps_its_peaks(tmp_path):
    samples = [made.memory(k, variables=5, staging=0, slots=k % 1000) for k in range(3000)]
    slots, variables = analysis_of(tmp_path, samples).memory
    assert (slots.owner, slots.peak, len(slots.seconds)) == ("slots", 999, 500)
    assert (variables.owner, {*variables.nbytes}) == ("variables", {5})
    assert slots.seconds == sorted(slots.seconds)


# -- advice ----------------------------------------------------------------------------------------

LIBRARIES = {"library_thread_seconds": [0.9, 0.01]}


@pytest.mark.parametrize(
    ("records", "about", "problems"),
    [
        (made.steady(20, (4.5, 4.5)), {}, []),
        (made.steady(20), {}, ["late replica"]),
        (made.steady(4), {}, []),  # too few steps to say anything
        (made.steady(20, (4.5, 4.5)), LIBRARIES, ["oversubscribed cores"]),
        (made.steady(20, (4.5, 4.5)), {**LIBRARIES, "cores": 3}, []),
    ],
    ids=["healthy", "late", "short", "BLAS", "enough cores"],
)
def test_the_rules_find_their_problem_and_no_other(tmp_path, records, about, problems):
    found = analysis_of(tmp_path, records, made.facts(**about)).advice
    assert [each.problem for each in found] == problems


def test_rules_say_the_numbers_and_the_setting(tmp_path):
    (late,) = analysis_of(tmp_path, made.steady(20)).advice
    assert "Replica 1 is late" in late.sentence
    assert 'InputOptions(balance="measured")' in late.change
    (cores,) = analysis_of(tmp_path, made.steady(20, (4.5, 4.5)), made.facts(**LIBRARIES)).advice
    assert "2 replicas and 1 threads" in cores.sentence
    assert "OMP_NUM_THREADS=1" in cores.change


# -- traces of small runs --------------------------------------------------------------------------


def test_the_parts_of_a_real_run_add_up(tmp_path):
    data = dv.Dataset.from_arrays(np.arange(48.0)).batch(8)
    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:

        def step(rows):
            handle = dv.get_replica_context().all_reduce_async("sum", np.ones(100))
            dv.get_replica_context().all_reduce("sum", rows.sum())
            return handle.wait()

        with dv.profiler.trace(tmp_path / "t.json"):
            for batch in strategy.distribute_dataset(data):
                strategy.run(step, (batch,))
    found = analysed(tmp_path / "t.json")
    one, other = found.times
    assert math.isclose(one.total, other.total)
    for each in found.times:
        assert each.num_steps == 5
        assert all(seconds > -1e-9 for seconds in each.seconds.values())
        assert each.seconds["input"] > 0
    assert {each.verb for each in found.bandwidths} == {"all_reduce", "all_reduce_async"}


def test_the_parts_of_a_real_job_add_up(traces, tmp_path):
    trace_merge.merge(traces, tmp_path / "m.json")
    table = trace_table.read(tmp_path / "m.json")
    found = analysis.analyse(table)
    assert [(each.worker, each.replica) for each in found.times] == [
        (0, 0), (0, 1), (1, 2), (1, 3)
    ]  # fmt: skip
    for each in found.times:
        assert each.num_steps == 4
        assert all(seconds > -1e-9 for seconds in each.seconds.values())
    for worker in (0, 1):  # all replicas of a worker have the same time
        one, other = (each.total for each in found.times if each.worker == worker)
        assert math.isclose(one, other)
    assert {each.num_meetings for each in found.lateness} == {10}
    assert [(each.verb, each.num_calls) for each in found.bandwidths] == [("all_reduce", 5)]
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["trace"]["spans"] == len(table)


def test_the_command_merges_prints_and_says_json(traces, tmp_path, capsys):
    names = list(map(str, traces))
    assert main.main(["report", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["worker"] for each in found["trace"]["workers"]] == [0, 1]
    assert main.main(["report", names[0]]) == 0
    assert "4 steps" in capsys.readouterr().out


# -- bad files -------------------------------------------------------------------------------------


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    path = made.write(tmp_path / "t.json", made.steady(2))
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"t\.json, line \d+: the file (is empty|was cut off)"):
            trace_table.read(path)


BAD = [
    (b"\x00\xff garbage", "cut off"),
    (b"[1, 2]\n", "begins with"),
    (b"\n" * 5, "begins with"),
]


@pytest.mark.parametrize(("content", "reason"), BAD)
def test_other_files_are_refused(tmp_path, content, reason, capsys):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    assert main.main(["report", str(path), "--json"]) == 2
    output = capsys.readouterr()
    assert reason in output.err
    assert "expected a trace as dv.profiler.trace" in json.loads(output.out)["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"ts": "now"}, {"ts": float("nan")}, {"dur": -1}, {"dur": None}, {"pid": "x"},
        {"tid": math.inf}, {"args": 3}, {"args": {"bytes": 1 << 70}}, {"name": []},
        {"args": {"variables": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_event_is_named_by_its_line(tmp_path, change):
    records = made.steady(1)
    records[2] = {**records[2], **change}
    path = made.write(tmp_path / "t.json", records)
    with pytest.raises(TraceError, match=r"t\.json, line 6: "):
        trace_table.read(path)


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = made.write(tmp_path / "t.json", made.steady(20))
    monkeypatch.setattr(trace_table, "MOST_SPANS", 10)
    with pytest.raises(TraceError, match="more than 10 spans; record fewer"):
        trace_table.read(path)
    with pytest.raises(TraceError, match="longer than"):
        trace_table.read("/dev/zero")
    nested = made.write(tmp_path / "n.json", [{"ph": "X"}])
    nested.write_bytes(nested.read_bytes().replace(b'"X"', b"[" * 100_000))
    with pytest.raises(TraceError, match="line 4"):
        trace_table.read(nested)


def test_missing_files_and_folders_are_named(tmp_path, capsys):
    assert main.main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main.main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_trace_without_events_has_an_analysis(tmp_path):
    found = analysis_of(tmp_path, [])
    assert (found.times, found.advice, found.spans, found.seconds) == ([], [], [], 0)


def mutated(draw, value):
    """Return what stands in a trace with one thing in it replaced."""
    odd = [None, True, -1, 0, 1e17, 1e300, math.nan, "\ud800\x1b[2J", "", [], {}, [[]], 3.5]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice([*value])
        if draw.random() < 0.1:
            return {key: each for key, each in value.items() if key != name}
        return {**value, name: mutated(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(draw, value[place]), *value[place + 1 :]]
    return draw.choice(odd)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.wide)])
def test_whatever_a_file_says_it_is_refused_or_analysed(tmp_path, count):
    draw = random.Random(count)
    counter = made.memory(3, variables=5)
    outcomes = set()
    for _ in range(count):
        records, about = [*made.steady(6), counter], made.facts(share_of_other_programs=0.1)
        for _ in range(draw.randrange(1, 4)):
            if draw.random() < 0.2:
                about = mutated(draw, about)
            else:
                records = mutated(draw, records)
        if not isinstance(records, list):
            continue
        path = made.write(tmp_path / "t.json", records, about)
        try:
            table = trace_table.read(path)
        except TraceError:
            outcomes.add("refused")
            continue
        found = analysis.analyse(table)
        main_name = found.times[0].strategy if found.times else ""
        shown = timeline.timeline(table, main_name, arrivals.meetings(table))
        drawn = figures.figures(table, found, shown)
        json.dumps([found.as_json(), drawn], allow_nan=False).encode()
        outcomes.add("analysed")
    assert outcomes == {"refused", "analysed"}


@pytest.mark.wide
def test_a_long_trace_is_read_in_little_memory(tmp_path):
    found = analysis_of(tmp_path, made.steady(40_000))
    assert found.num_spans == 240_000
    assert milliseconds(found.times[0])["reduce"] == 1


def test_thresholds_are_shares():
    assert 0 < advice._READ_SHARE < advice._LATE_SHARE < advice._INPUT_SHARE < 1
