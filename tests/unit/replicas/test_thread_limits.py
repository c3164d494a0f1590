"""Threads of BLAS, OpenMP and Numba: cores // replicas in each, and as before afterwards."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
import threading
import types

import fork_server
import interrupt_points
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

import dvkernels as dv
from dvkernels.replicas import thread_limits

CORES = 8

found = [one for one in threadpool_info() if one["internal_api"] == "openblas"]
own_numbers = [one for one in found if one.get("threading_layer") != "openmp"]
needs_openblas = pytest.mark.skipif(not own_numbers, reason="NumPy is built with another BLAS")


def cpus(number):
    return [f"cpu:{k}" for k in range(number)]


def mirrored(number, **options):
    return dv.MirroredStrategy(cpus(number), **options)


def seen(api="openblas"):
    return {one["num_threads"] for one in threadpool_info() if one["internal_api"] == api}


def nothing():
    return None


@pytest.fixture(scope="module")
def settings():
    """Return what gets and sets the threads of each BLAS of the process."""
    with mirrored(2) as strategy:
        strategy.run(nothing)  # imports all of Numba, and with it another BLAS
        strategy.run(nothing)
    return list(thread_limits._of_process.values())


@pytest.fixture
def blas(settings, monkeypatch):
    """Return a function that sets the threads of the process's BLAS, 8 at first."""
    before = [setting.get() for setting in settings]
    monkeypatch.setattr(thread_limits.cpu, "usable_cores", lambda: CORES)

    def set_all(number):
        for setting in settings:
            setting.set(number)

    set_all(CORES)
    yield set_all
    for setting, number in zip(settings, before, strict=True):
        setting.set(number)


@needs_openblas
@pytest.mark.usefixtures("blas")
def test_functions_of_a_map_share_the_cores():
    import numba

    with mirrored(4) as strategy:
        assert set(strategy.map(lambda _: (*seen(),), range(9))) == {(2,)}
        assert {*strategy.map(lambda _: numba.get_num_threads(), range(9))} <= {1, 2}
    assert seen() == {CORES}


@needs_openblas
@pytest.mark.usefixtures("blas")
class TestOfTheProcess:
    @pytest.mark.parametrize(("replicas", "share"), [(2, 4), (3, 2), (8, 1), (9, 1)])
    def test_from_the_first_step_until_close(self, replicas, share):
        with mirrored(replicas) as strategy:
            assert seen() == {CORES}
            assert strategy.run(lambda: str(seen())).values == (str({share}),) * replicas
            assert seen() == {share}
        assert seen() == {CORES}
        strategy.close()
        assert seen() == {CORES}

    @pytest.mark.parametrize("closed", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
    def test_the_smallest_share_holds(self, closed):
        strategies, shares = [mirrored(2), mirrored(8), mirrored(4)], [4, 1, 2]
        for strategy in strategies:
            strategy.run(nothing)
        for k in closed:
            assert seen() == {min(share for share in shares if share)}
            strategies[k].close()
            shares[k] = CORES
        assert seen() == {CORES}

    def test_dropped_without_close(self):
        strategy = mirrored(4)
        strategy.run(nothing)
        assert seen() == {2}
        del strategy
        gc.collect()
        assert seen() == {CORES}

    def test_in_the_functions_of_a_map(self):
        with mirrored(4) as strategy:
            assert set(strategy.map(lambda _: str(seen()), range(20))) == {"{2}"}
        assert seen() == {CORES}

    def test_a_failing_first_step(self):
        with mirrored(4) as strategy, pytest.raises(ZeroDivisionError):
            strategy.run(lambda: 1 / 0)
        assert seen() == {CORES}

    def test_fewer_threads_are_never_raised(self, blas):
        blas(3)
        with mirrored(2) as strategy:
            strategy.run(nothing)
            assert seen() == {3}
        assert seen() == {3}

    def test_what_somebody_sets_meanwhile_stays(self, blas):
        with mirrored(4) as strategy:
            strategy.run(nothing)
            blas(5)
            strategy.run(nothing)
            assert seen() == {5}
        assert seen() == {5}

    @pytest.mark.parametrize(
        "make",
        [
            lambda: mirrored(1),
            lambda: dv.OneDeviceStrategy("cpu:3"),
            lambda: mirrored(4, threads="all"),
            lambda: dv.CentralStorageStrategy(cpus(4), threads="all"),
            lambda: dv.MultiWorkerMirroredStrategy(devices=cpus(4), threads="all"),
            lambda: dv.Strategy(cpus(4), threads="all"),
        ],
    )
    def test_left_alone(self, make):
        with make() as strategy:
            strategy.run(nothing)
            assert seen() == {CORES}

    @pytest.mark.parametrize(
        "make",
        [
            dv.CentralStorageStrategy,
            dv.Strategy,
            lambda d: dv.MultiWorkerMirroredStrategy(devices=d),
        ],
    )
    def test_every_strategy_shares(self, make):
        with make(cpus(4)) as strategy:
            strategy.run(nothing)
            assert seen() == {2}

    def test_from_several_threads_at_once(self):
        def use(replicas):
            for _ in range(20):
                with mirrored(replicas) as strategy:
                    strategy.run(nothing)
                    assert max(seen()) <= CORES // replicas

        errors = []
        threading.excepthook, before = (
            lambda failed: errors.append(failed.exc_value),
            threading.excepthook,
        )
        try:
            threads = [threading.Thread(target=use, args=(number,)) for number in (2, 3, 4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        finally:
            threading.excepthook = before
        assert errors == []
        assert seen() == {CORES}

    def test_a_library_loaded_after_the_first_step(self, tmp_path):
        path = tmp_path / "libopenblas_late.so"
        shutil.copy(own_numbers[0]["filepath"], path)
        with mirrored(4) as strategy:
            strategy.run(nothing)
            ctypes.CDLL(str(path))
            late = [
                one for one in ThreadpoolController().lib_controllers if one.filepath == str(path)
            ]
            assert late[0].num_threads > 0
            sys.modules["late"] = types.ModuleType("late")  # as the import that loads it does
            try:
                strategy.run(nothing)
            finally:
                del sys.modules["late"]
            assert late[0].num_threads <= 2


def in_replicas(program):
    """Run a program in a process of its own, where Numba has started no threads yet."""
    prelude = """
import os, numba, threading
import numpy as np
import dvkernels as dv
from threadpoolctl import threadpool_info
from dvkernels.replicas import thread_limits
thread_limits.cpu.usable_cores = lambda: 2
def seen(api):
    return sorted({one['num_threads'] for one in threadpool_info() if one['internal_api'] == api})
def of(api):
    return tuple(strategy.run(lambda: str(seen(api))).values)
strategy = dv.MirroredStrategy(['cpu:0', 'cpu:1'])
"""
    done = fork_server.run(
        prelude + program, timeout=60, NUMBA_NUM_THREADS="2", OMP_NUM_THREADS="2"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numba_from_its_first_use_on():
    in_replicas("""
for _ in range(3):
    assert strategy.run(numba.get_num_threads).values == (1, 1)
    assert numba.get_num_threads() == 2
def set_two():
    numba.set_num_threads(2)
strategy.run(set_two)
assert strategy.run(numba.get_num_threads).values == (1, 2)  # the second thread is its own
assert numba.get_num_threads() == 2
numba.set_num_threads(1)
strategy.run(lambda: None)
assert numba.get_num_threads() == 1
strategy.close()
assert numba.get_num_threads() == 1
""")


def test_numba_before_its_first_use_elsewhere():
    in_replicas("""
strategy.run(lambda: None)
assert numba.get_num_threads() == 2
assert strategy.run(numba.get_num_threads).values == (1, 1)
with dv.MirroredStrategy(['cpu:0', 'cpu:1'], threads='all') as free:
    assert free.run(numba.get_num_threads).values == (2, 2)
other = []
caller = threading.Thread(target=lambda: other.append((
    strategy.run(numba.get_num_threads).values, numba.get_num_threads())))
caller.start()
caller.join()
assert other == [((1, 1), 2)]
""")


def test_numba_in_the_functions_of_a_map():
    in_replicas("""
for _ in range(2):
    assert set(strategy.map(lambda _: numba.get_num_threads(), range(50))) == {1}
    assert numba.get_num_threads() == 2
""")


def test_openmp_in_each_replica_and_back():
    assert "openmp" in in_replicas("""
numba.get_num_threads()  # loads OpenMP, where Numba uses it
if seen('openmp'):
    for _ in range(2):
        assert of('openmp') == ('[1]', '[1]')
        assert seen('openmp') == [2]
print('openmp')
""")


@needs_openblas
def test_a_fork_inherits_the_limit_and_the_right_to_end_it():
    in_replicas("""
strategy.run(lambda: None)
assert seen('openblas') == [1]
child = os.fork()
if child == 0:
    assert strategy.run(lambda: seen('openblas')[0]).values == (1, 1)
    strategy.close()
    os._exit(seen('openblas') != [2])
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert seen('openblas') == [1]
strategy.close()
assert seen('openblas') == [2]
""")


INTERRUPTED = """
import gc, time, numba
import numpy as np
import dvkernels as dv
from threadpoolctl import threadpool_info
from dvkernels.replicas import thread_limits
thread_limits.cpu.usable_cores = lambda: 2
def nothing(): pass
def seen():
    return sorted((one['filepath'], one['num_threads']) for one in threadpool_info())
with dv.MirroredStrategy(['cpu:0', 'cpu:1']) as warm:
    warm.run(numba.get_num_threads)
    warm.run(nothing)
before = seen(), numba.get_num_threads()
"""


STEP = """
def make():
    strategy = dv.MirroredStrategy(['cpu:0', 'cpu:1'])
    strategy.run(nothing)
    def check(_):
        assert numba.get_num_threads() == before[1]
        strategy.close()
        assert seen() == before[0], (seen(), before)
    return lambda: strategy.run(nothing), check
"""
FIRST_STEP_AND_CLOSE = """
def make():
    def act():
        with dv.MirroredStrategy(['cpu:0', 'cpu:1']) as strategy:
            strategy.run(nothing)
    def check(_):
        end = time.monotonic() + 10  # what the interrupt left behind is dropped by other threads
        while seen() != before[0] and time.monotonic() < end:
            gc.collect()
        assert (seen(), numba.get_num_threads()) == before
    return act, check
"""


@pytest.mark.parametrize(
    ("program", "sample"),
    [
        (FIRST_STEP_AND_CLOSE, 10),
        pytest.param(STEP, None, marks=pytest.mark.wide),
        pytest.param(FIRST_STEP_AND_CLOSE, 60, marks=pytest.mark.wide),
    ],
    ids=["sample", "step", "first step and close"],
)
def test_no_interrupt_leaves_a_limit(program, sample):
    broken = interrupt_points.broken_in(INTERRUPTED + program, sample=sample)
    assert not broken, broken.text()


# -- without threadpoolctl -------------------------------------------------------------------------


@pytest.fixture
def without_threadpoolctl(monkeypatch):
    monkeypatch.setattr(thread_limits, "_threadpoolctl", lambda: None)
    monkeypatch.setattr(thread_limits, "_has_warned", False)
    monkeypatch.setattr(thread_limits.cpu, "usable_cores", lambda: CORES)
    for name in thread_limits._VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("without_threadpoolctl")
def test_one_warning_names_the_remedy():
    with mirrored(2) as first, mirrored(4) as second:
        with pytest.warns(
            RuntimeWarning, match=r"held to 4.*threadpoolctl.*OMP_NUM_THREADS=4"
        ) as told:
            first.run(nothing)
        assert told[0].filename == __file__
        second.run(nothing)


@pytest.mark.usefixtures("without_threadpoolctl")
def test_info_says_it_on_a_line_of_its_own_and_does_not_warn(capsys):
    from dvkernels.cli import main

    assert main.main(["info"]) == 0  # a warning, which is an error here, would fail its check
    assert "threadpoolctl is not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("without_threadpoolctl")
@pytest.mark.parametrize("name", thread_limits._VARIABLES)
def test_no_warning_where_the_environment_holds_them(monkeypatch, name):
    monkeypatch.setenv(name, "4,2")
    with mirrored(2) as strategy:
        strategy.run(nothing)


# -- options ---------------------------------------------------------------------------------------

MAKERS = {
    "Strategy": lambda **options: dv.Strategy(cpus(2), **options),
    "OneDeviceStrategy": lambda **options: dv.OneDeviceStrategy("cpu:0", **options),
    "MirroredStrategy": lambda **options: mirrored(2, **options),
    "CentralStorageStrategy": lambda **options: dv.CentralStorageStrategy(cpus(2), **options),
    "MultiWorkerMirroredStrategy": lambda **options: dv.MultiWorkerMirroredStrategy(
        devices=cpus(2), **options
    ),
}
every_strategy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_strategy
@pytest.mark.parametrize("threads", ["one", "ALL", None, 1, True, ["share"]])
def test_other_threads_are_refused(make, threads):
    with pytest.raises(ValueError, match=r"'share'.*'all'"):
        make(threads=threads)


@every_strategy
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon", None])
def test_other_timeouts_are_refused(make, seconds):
    with pytest.raises(ValueError, match="timeout_seconds is a positive number"):
        make(timeout_seconds=seconds)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "OneDeviceStrategy"])
def test_a_timeout_of_the_strategy_is_that_of_its_steps(name, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "500")
    has_given_up = threading.Event()

    def late():
        replica = dv.get_replica_context()
        if replica.replica_id_in_sync_group == 1:
            assert has_given_up.wait(60)
        try:
            replica.all_reduce("sum", np.ones(1))
        finally:
            has_given_up.set()

    is_late = pytest.raises(dv.errors.CollectiveTimeoutError, match=r"0\.1 s.*timeout_seconds")
    with MAKERS[name](timeout_seconds=0.1) as strategy, is_late:
        strategy.run(late)


def test_a_timeout_of_the_strategy_is_that_of_the_next_step(monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "500")
    is_inside, may_end = threading.Event(), threading.Event()
    with dv.OneDeviceStrategy("cpu:0", timeout_seconds=0.1) as strategy:
        caller = threading.Thread(
            target=strategy.run, args=(lambda: (is_inside.set(), may_end.wait(60)),)
        )
        caller.start()
        assert is_inside.wait(60)
        with pytest.raises(dv.errors.CollectiveTimeoutError, match=r"0\.1 s"):
            strategy.run(nothing)
        may_end.set()
        caller.join(60)
