"""The history of the limits: noise is no verdict, a step is one, at its commit and only there."""

from __future__ import annotations

import itertools
import random

import pytest
from peers import check_limits, limit_history, main, record_limits
from peers.limit_history import WINDOW, LimitRun, verdicts


def slower(levels, noise=0.0, seed=0, runs=WINDOW):
    """Return the numbers of the commits that are slower: commit k has ``levels[k]``, and noise."""
    rng = random.Random(seed)
    commits = [k for k in range(len(levels)) for _ in range(runs)]
    ratios = [levels[k] * (1 + rng.uniform(-noise, noise)) for k in commits]
    return [k for k, verdict in verdicts(commits, ratios).items() if verdict.is_slower]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_verdict_and_a_step_is_one_where_it_happens(seed):
    level = random.Random(seed).uniform(0.8, 2)
    assert slower([level] * 30, 0.02, seed) == []
    assert slower([level] * 10 + [1.12 * level] * 10, 0.02, seed) == [10]
    assert slower([1.3 * level] * 5 + [level] * 5 + [1.12 * level] * 5, 0.02, seed) == [10]


@pytest.mark.parametrize("runs", [1, 2, WINDOW, 2 * WINDOW])
def test_any_number_of_runs_for_each_commit(runs):
    assert slower([1.0] * 8 + [1.06] * 8, runs=runs) == [8]
    assert slower([1.0] * 8 + [1.04] * 8, runs=runs) == []


def test_small_losses_add_up():
    found = slower([1.02**k for k in range(12)])
    assert found[0] == 3  # 6 %
    assert 3 <= len(found) <= 4


def test_a_disturbed_run_is_neither_a_verdict_nor_hides_one():
    for place in range(12):
        ratios = [1.0] * 6 + [1.1] * 6
        ratios[place] *= 3
        found = verdicts(range(12), ratios)
        reported = [k for k, verdict in found.items() if verdict.is_slower]
        assert reported == [5 if place == 5 else 6]  # the run before a step may count as its first


def test_few_runs_are_no_verdict():
    assert verdicts("abcde", [1, 1, 1, 2, 2]) == {}
    (only,) = verdicts("abcdef", [1, 1, 1, 2, 2, 2]).items()
    assert only[0] == "d"
    assert only[1].change == pytest.approx(1.0)


def limit_run(commit, ratio, day, machine="here"):
    case = {"direct 2 x 1 MiB": [ratio, ratio, ratio], "ring 2 x 1 MiB": [1.0, 1.0, 1.0]}
    return LimitRun(commit, f"2026-01-{day:02}", "2026-02-01", machine, "", 11, 0.0, case)


@pytest.fixture
def history(tmp_path):
    """Return a function that writes a history, and one that calls a verb with it."""
    path = tmp_path / "history.jsonl"

    def write(runs):
        path.write_text(limit_history.text_of(runs))

    def call(*words):
        return main.main([*words, "--history", str(path)])

    return write, call, path


def test_the_command_says_which_case_is_slower(history, capsys):
    write, call, _ = history
    aside = [limit_run("bbb2", 9.0, 2, "elsewhere")] * WINDOW
    late = [limit_run("aaa1", 1.0, 1)] * WINDOW  # measured last: commits are in order
    write([limit_run("bbb2", 1.2, 2)] * WINDOW + aside[:-1] + late)
    assert call("check-limits", "bbb") == 1
    out = capsys.readouterr().out
    assert "direct 2 x 1 MiB   1.200, before 1.000: +20.0%  SLOWER" in out
    assert "slower by more than 5% in 1 of 2 cases" in out
    write([*late, *[limit_run("ccc3", 1.03, 3)] * WINDOW])
    assert call("check-limits") == 0
    assert "in 0 of 2 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "an empty history"),
        ([limit_run("aaa1", 1, 1)] * WINDOW, "3 runs before commit aaa1"),
        ([limit_run("aaa1", 1, 1)] * WINDOW + [limit_run("bbb2", 1, 2)], "3 from it on"),
    ],
)
def test_what_is_missing_is_said(history, capsys, runs, words):
    write, call, _ = history
    write(runs)
    assert call("check-limits") == 2
    error = capsys.readouterr().err
    assert words in error
    assert "record-limits" in error


@pytest.mark.parametrize("line", ["{", "{}", "[]", '{"commit": "a"}'])
def test_a_damaged_line_is_named(history, capsys, line):
    write, call, path = history
    write([limit_run("aaa1", 1, 1)])
    path.write_text(path.read_text() + line + "\n")
    assert call("check-limits") == 2
    assert "line 2 of" in capsys.readouterr().err


@pytest.mark.parametrize("share", [None, 0.02, 0.5])
def test_runs_are_added_to_the_history_unless_the_machine_is_busy(history, monkeypatch, share):
    write, call, path = history
    write([limit_run("aaa1", 1.0, 1)])
    ratios = itertools.count(2.0)
    monkeypatch.setattr(record_limits.CoreUsage, "share_of_others", lambda self: share)
    monkeypatch.setattr(record_limits, "_times_of_c", lambda case, rounds: [next(ratios)] * 3)
    monkeypatch.setattr(record_limits.c_probe, "reason_for_none", lambda: "")
    monkeypatch.setattr(record_limits.c_probe, "describe", lambda: "")
    monkeypatch.setattr(record_limits, "CASES", [("direct", 2, 1 << 20)])
    assert call("record-limits", "--runs", "2", "--rounds", "1") == (share == 0.5)
    runs = limit_history.load(path)
    added = [] if share == 0.5 else [2.0, 3.0]
    assert [run.times_of_c["direct 2 x 1 MiB"][0] for run in runs] == [1.0, *added]
    assert all(run.commit != "aaa1" for run in runs[1:])


def test_without_a_compiler_nothing_is_recorded(history, monkeypatch, capsys):
    _, call, path = history
    monkeypatch.setattr(record_limits.c_probe, "reason_for_none", lambda: "there is no cc")
    assert call("record-limits") == 2
    assert "there is no cc" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.wide
def test_a_case_is_measured_beside_c():
    if record_limits.c_probe.reason_for_none():
        pytest.skip("there is no C compiler")
    case = record_limits.cases.case("all_reduce", 1 << 20, "float32", "mean", 2, "ring")
    middle, low, high = record_limits._times_of_c(case, 3)
    assert 0 < low <= middle <= high


def test_the_history_of_this_repository_can_be_read():
    runs = limit_history.load(limit_history.FILE)
    assert all(not run.commit.endswith("-dirty") for run in runs)
    assert check_limits.HELP
