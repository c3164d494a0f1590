"""Tracebacks show the users' lines, of causes too: in scripts, steps, maps and iterators."""

from __future__ import annotations

import traceback

import fork_server
import numpy as np
import pytest

import dvkernels as dv
from dvkernels import tracebacks

WRONG_SHAPE = """
import numpy as np
import dvkernels as dv

strategy = dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2", "cpu:3"])

def step():
    replica = dv.get_replica_context()
    return replica.all_reduce("sum", np.ones(3 + (replica.replica_id_in_sync_group == 2)))

strategy.run(step)
"""


def files_of(error):
    return {frame.filename for frame in traceback.extract_tb(error.__traceback__)}


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


def test_a_wrong_shape_in_a_step_takes_a_few_lines(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WRONG_SHAPE)
    code = f"import runpy; runpy.run_path({str(program)!r})"
    lines = fork_server.run(code).stderr.splitlines()
    assert len([line for line in lines if "runpy" not in line]) <= 10  # 38, in a notebook 104
    assert not [line for line in lines if tracebacks.PACKAGE in line]
    assert "the replicas disagree" in lines[-1]
    full = fork_server.run(code, DVKERNELS_TRACEBACK="full").stderr
    assert f"{tracebacks.PACKAGE}verbs.py" in full


def raise_zero(*_):
    return 1 // 0


def failures(strategy):
    data = strategy.distribute_dataset(
        dv.Dataset.from_arrays(np.arange(4)).map(raise_zero).batch(2)
    )
    iterator = iter(data)
    yield lambda: strategy.run(raise_zero)
    yield lambda: list(strategy.map(raise_zero, range(4)))
    yield lambda: next(iterator)
    iterator.close()


def test_errors_of_users_functions_show_no_frame_of_the_package(strategy):
    for fail in failures(strategy):
        with pytest.raises(ZeroDivisionError) as caught:
            fail()
        assert files_of(caught.value) == {__file__}


def test_full_keeps_all_frames(strategy, monkeypatch):
    monkeypatch.setenv(tracebacks.VARIABLE, "full")
    with pytest.raises(ZeroDivisionError) as caught:
        strategy.run(raise_zero)
    assert any(name.startswith(tracebacks.PACKAGE) for name in files_of(caught.value))


def test_causes_are_trimmed_and_cycles_end(strategy):
    def fail():
        try:
            dv.kernels.all_reduce([np.ones(3), np.ones(4)])
        except dv.errors.BufferMismatchError as error:
            raise KeyError("ours") from error

    with pytest.raises(KeyError) as caught:
        strategy.run(fail)
    assert files_of(caught.value) == files_of(caught.value.__cause__) == {__file__}
    caught.value.__cause__.__cause__ = caught.value
    tracebacks.trim(caught.value)


def test_an_error_that_only_the_package_has_seen_keeps_its_frames():
    try:
        dv.kernels.all_reduce([np.ones(3), np.ones(4)])
    except dv.errors.BufferMismatchError as error:
        own = error.__traceback__.tb_next
    assert tracebacks.of_users(own) is own
    assert tracebacks.of_users(None) is None


def test_what_all_replicas_raise_is_said_once(strategy):
    with dv.MirroredStrategy([f"cpu:{k}" for k in range(4)]) as four:
        with pytest.raises(ZeroDivisionError) as caught:
            four.run(raise_zero)
        said = ["replicas 1, 2, 3 also raised it", "raised in replica 0 of 4"]
        assert caught.value.__notes__ == said

        def fail():
            replica = dv.get_replica_context().replica_id_in_sync_group
            raise ValueError("odd" if replica % 2 else "even")

        with pytest.raises(ValueError, match="even") as caught:
            four.run(fail)
        assert {*caught.value.__notes__[:2]} == {
            "replicas 1, 3 also raised ValueError: odd",
            "replica 2 also raised it",
        }
