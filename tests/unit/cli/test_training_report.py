"""What train reports: parts of a step, the speed-up beside the possible one, and notes in words."""

from __future__ import annotations

import math
import time

import pytest

from dvkernels.cli import digits, mlp, training_report
from dvkernels.cli.compute_alone import ComputeAlone
from dvkernels.cli.step_times import PARTS, StepTimes
from dvkernels.cli.training_config import TrainingConfig
from dvkernels.profiler import core_usage


def found(**changes):
    return {
        "diverged": False, "final_loss": 0.1, "steps": 100, "learning_rate": 0.04,
        "share_of_other_programs": 0.01, "num_replicas": 2, "batch_size": 64, "hidden": 64,
        "speed_up": 1.7, "possible_speed_up": 1.9, "speed_up_over_possible": 0.9,
        "seconds": {"compute": 1e-3, "waiting": 1e-5, "reduce and update": 1e-4},
        **changes,
    }  # fmt: skip


def test_the_parts_of_the_replicas_and_the_caller_add_up_to_the_step():
    times = StepTimes(2)
    times.marks[:] = [(2.0, 5.0, 8.0), (3.0, 7.0, 9.0)]  # began, computed, updated
    times.add(started=0.0, fetched=1.0, returned=10.0, num_examples=64)
    times._elapsed = 11.0
    parts = times.by_part()
    assert list(parts) == [*PARTS, "unnamed"]
    assert parts | {"loss": 0, "checkpoint": 0} == {
        "input": 1.0, "start": 1.5, "compute": 3.5, "waiting": 1.0, "reduce and update": 1.5,
        "end": 1.5, "loss": 0, "checkpoint": 0, "unnamed": 1.0,
    }  # fmt: skip
    assert sum(parts.values()) == times.seconds_per_step == 11.0
    assert times.examples_per_second == 64 / 11


def test_a_paused_clock_stands_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dvkernels.cli.step_times.clock", lambda: now[0])
    times = StepTimes(1)
    with times.running():
        now[0] += 1
        with times.paused():
            now[0] += 10
        assert times.elapsed == 1
        with times.measured("checkpoint"):
            now[0] += 2
    now[0] += 100
    times.add(0.0, 0.0, 0.0, 1)
    assert times.elapsed == 3
    assert times.by_part()["checkpoint"] == 2


@pytest.mark.parametrize("num_replicas", [1, 3, 7])
def test_the_compute_alone_is_that_of_the_replicas(num_replicas, monkeypatch):
    seen = []

    def compute(weights, images, labels, workspace):
        seen.append((len(images), workspace.gradient.shape))
        time.sleep(0.001 * len(images))

    monkeypatch.setattr(mlp, "gradient_and_loss", compute)
    config = TrainingConfig(batch_size=16, num_hidden=8)
    alone = ComputeAlone(config, digits.load("float32"), num_replicas, num_replicas)
    shape = (mlp.num_weights(8) + 1,)
    one = alone.on_one_thread(None, 2)
    assert seen == [(16, shape)] * 2
    seen.clear()
    everything = alone.on_all_threads(None, 2)
    assert sorted(seen) == sorted([(len(range(k, 16, num_replicas)), shape)
                                   for k in range(num_replicas)] * 2)  # fmt: skip
    assert one < 1000
    assert everything < 1000 * num_replicas


def test_other_programs_are_the_busy_cores_less_this_process(monkeypatch):
    moments = iter([(0.0, 10.0, 1.0), (10.0, 18.0, 4.0), (20.0, 10.0, 9.0), (30.0, None, 0.0)])
    monkeypatch.setattr(core_usage, "_now", lambda: next(moments))
    monkeypatch.setattr(core_usage, "_cores", lambda: {0, 1})
    usage = core_usage.CoreUsage()
    assert usage.share_of_others() == pytest.approx((8 - 3) / 10 / 2)
    assert usage.share_of_others() == 0
    assert usage.share_of_others() is None


def test_busy_time_is_that_of_own_cores_without_idling(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 3 999 999 4 5 6 77 7\n"
        "cpu1 1000 0 0 5 5 0 0 0 0 0\ncpu2 9 9 9 9 9 9 9 9 9 9\nintr 1 2 3\n"
    )
    monkeypatch.setattr(core_usage, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(core_usage, "_cores", lambda: {0, 1})
    ticks = core_usage.os.sysconf("SC_CLK_TCK")
    assert core_usage._busy_seconds() == pytest.approx(1138 / ticks)
    monkeypatch.setattr(core_usage, "_STAT", tmp_path / "none")
    assert core_usage._busy_seconds() is None


def test_a_good_run_needs_no_notes():
    assert training_report.notes(found(), 1000) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, 5.0])
def test_a_loss_far_above_guessing_is_diverged(loss):
    assert training_report.diverged(loss)
    assert not training_report.diverged(2.5)
    shown = training_report._finite(loss)
    (note,) = training_report.notes(found(diverged=True, final_loss=shown), 1000)
    assert "diverged" in note
    assert "below 0.04" in note


def test_work_that_is_too_small_names_the_part_and_a_size_that_pays():
    parts = {"compute": 1e-3, "waiting": 1e-4, "reduce and update": 9e-4}
    small = found(speed_up=1.0, speed_up_over_possible=0.5, seconds=parts)
    (note,) = training_report.notes(small, num_examples=10_000)
    assert "reduce and update (900 us)" in note
    assert "--batch-size 1024 " in note  # 9 times as much compute, rounded up to a power of two
    (note,) = training_report.notes(small, num_examples=1000)
    assert "--hidden 1024 " in note


@pytest.mark.parametrize(("siblings", "reason"), [(True, "one physical core"), (False, "share")])
def test_cores_that_cannot_gain_are_said(siblings, reason, monkeypatch):
    monkeypatch.setattr(core_usage, "share_a_physical_core", lambda: siblings)
    virtual = found(speed_up=1.05, possible_speed_up=1.1, speed_up_over_possible=0.95)
    (note,) = training_report.notes(virtual, 1000)
    assert "1.10 times" in note
    assert reason in note


def test_other_programs_are_named_before_anything_else_is_blamed():
    busy = found(share_of_other_programs=0.4, possible_speed_up=1.0, speed_up_over_possible=0.2)
    (note,) = training_report.notes(busy, 1000)
    assert "other programs took 40%" in note
    busy["seconds"] = {"compute": 1e-4, "start": 1e-3}
    _, note = training_report.notes(busy, 1000)
    assert "too small" in note
