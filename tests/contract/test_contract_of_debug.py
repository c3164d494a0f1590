"""Debug mode: its findings, the names in its messages, and no effect when switched off."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from shorthands import context, replica, variable

import dvkernels as dv
from dvkernels.errors import DriftError, NonFiniteError


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    dv.debug(False)


def spoil(view: Any, value: float) -> None:
    """Write a read-only copy, as a stray pointer in a user's kernel would."""
    ctypes.c_double.from_address(view.ctypes.data).value = value


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["assign", "assign_add", "assign_sub"])
@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
def test_non_finite_values_are_named(two: dv.Strategy, mode: str, method: str, bad: float) -> None:
    v = variable(two, np.ones(2), name="w", synchronization=mode, aggregation="mean")

    def body() -> None:
        getattr(v, method)(np.array([1.0, bad if replica() == 1 else 1.0]))

    with dv.debug():
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="replica 1") as caught:
                two.run(body)
            assert "'w'" in str(caught.value)
            assert "step" in str(caught.value)
            assert np.isfinite(v.values[1]).all()
        with pytest.raises(NonFiniteError, match="'w'"):
            getattr(v, method)(np.array([1.0, bad]))
        assert np.isfinite(v.values).all()
    two.run(body)
    assert not np.isfinite(v.values[1]).all()


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter", "broadcast"])
def test_nan_passed_to_a_collective(two: dv.Strategy, name: str) -> None:
    def body() -> Any:
        value = np.array([1.0, np.nan if replica() == 1 else 1.0])
        ops = ("sum",) if name in ("all_reduce", "reduce_scatter") else ()
        root = {"root": 1} if name == "broadcast" else {}
        return getattr(context(), name)(*ops, {"deep": [value]}, **root)

    with dv.debug():
        with pytest.raises(NonFiniteError, match="replica 1") as caught:
            two.run(body)
        assert name in str(caught.value)
        assert two.run(lambda: context().all_reduce("sum", np.ones(1)))[0] == 2
    two.run(body)


def test_values_of_weight_zero_are_not_checked(two: dv.Strategy) -> None:
    def body() -> Any:
        value = np.array(np.nan if replica() else 3.0)
        return context().all_reduce("mean", value, weight=0.0 if replica() else 1.0)

    with dv.debug():
        assert [float(one) for one in two.run(body).values] == [3.0, 3.0]


def test_integers_and_16_bit_floats(two: dv.Strategy) -> None:
    v = variable(two, np.ones(2, "i4"), aggregation="sum")
    half = variable(two, np.ones(2, "f2"), aggregation="sum", name="half")
    with dv.debug():
        two.run(lambda: v.assign_add(np.ones(2, "i4")))
        assert v.numpy().tolist() == [3, 3]
        with pytest.raises(NonFiniteError, match="half"):
            two.run(lambda: half.assign(np.full(2, np.inf, "f2")))
        assert half.numpy().tolist() == [1.0, 1.0]


def test_copies_that_drifted(two: dv.Strategy) -> None:
    v = variable(two, np.ones(3), name="drifter")
    fine = variable(two, np.ones(3), synchronization="none", name="loose")
    with dv.debug():
        two.run(lambda: fine.assign(np.full(3, float(replica()))))  # may differ
        spoil(v.values[1], 7.0)
        with pytest.raises(DriftError, match="drifter") as caught:
            two.run(lambda: None)
        assert "replica 1" in str(caught.value)
        v.assign(np.zeros(3))
        two.run(lambda: None)
    spoil(v.values[1], 7.0)
    two.run(lambda: None)  # debug mode is off


def test_as_a_context_manager_it_restores_the_previous_mode(two: dv.Strategy) -> None:
    def nan() -> Any:
        return context().all_reduce("sum", np.array(np.nan))

    with dv.debug():
        with dv.debug(False):
            two.run(nan)
        with pytest.raises(NonFiniteError):
            two.run(nan)
    two.run(nan)
    dv.debug()
    with pytest.raises(NonFiniteError):
        two.run(nan)
    dv.debug(enabled=False)
    two.run(nan)
    with pytest.raises(KeyError), dv.debug():
        raise KeyError
    two.run(nan)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="stall_seconds"):
            dv.debug(stall_seconds=wrong)
    two.run(nan)


def test_a_stall_is_reported(two: dv.Strategy, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    def tardy() -> None:
        if replica() == 1:
            assert release.wait(30)
        context().barrier()

    def free_once_reported() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not caplog.records:
            time.sleep(0.01)
        release.set()

    freer = threading.Thread(target=free_once_reported)
    with caplog.at_level(logging.DEBUG, "dvkernels"), dv.debug(stall_seconds=0.2):
        freer.start()
        two.run(tardy)
        freer.join()
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert warnings
    said = warnings[0].getMessage()
    assert "replica 0" in said
    assert "barrier" in said
    assert "tardy" in said  # the stacks
    assert warnings[0].name.startswith("dvkernels")


def test_a_failed_step_logs_the_last_collectives(
    two: dv.Strategy, caplog: pytest.LogCaptureFixture
) -> None:
    def body() -> None:
        context().all_gather(np.ones(3))
        if replica():
            raise KeyError("after the gather")
        context().barrier()

    with caplog.at_level(logging.DEBUG, "dvkernels"), dv.debug(), pytest.raises(KeyError):
        two.run(body)
    assert "all_gather" in caplog.text
    assert any(one.levelno >= logging.ERROR for one in caplog.records)


def test_redundant_reads_of_a_metric_warn_once(
    two: dv.Strategy, caplog: pytest.LogCaptureFixture
) -> None:
    metric = variable(two, 0.0, synchronization="on_read", aggregation="sum", name="metric")
    with caplog.at_level(logging.WARNING, "dvkernels"), dv.debug():
        for _ in range(3):
            two.run(lambda: metric.assign_add(1.0))
            for _ in range(3):
                metric.numpy()
    about = [one for one in caplog.records if "metric" in one.getMessage()]
    assert len(about) == 1


def test_the_logger_is_silent_by_default(
    two: dv.Strategy, capfd: pytest.CaptureFixture[str]
) -> None:
    v = variable(two, np.ones(2), aggregation="sum")
    with dv.debug():
        two.run(lambda: v.assign_add(np.ones(2)))
        with pytest.raises(KeyError):
            two.run(lambda: {}["missing"])
    assert capfd.readouterr() == ("", "")


def test_memory_counts_living_variables(two: dv.Strategy) -> None:
    def held() -> int:
        return sum(owners.get("variables", 0) for owners in dv.profiler.memory().by_device.values())

    gc.collect()  # collect cyclic garbage of earlier tests before the first report
    before = held()
    v = variable(two, np.zeros(1 << 17))
    assert held() - before >= 2 << 20
    assert len(v.values) == 2
    assert "cpu" in str(dv.profiler.memory())
    del v
    assert held() - before < 1 << 20
