"""The roll call of a host group: who gets in, who is told what, and what is left of it.

Mostly of threads of one process, each of which is a worker.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import signal
import time

import interrupt_points
import numpy as np
import pytest
from threads_as_workers import at_once, results

import dvkernels as dv
from dvkernels.cluster import HostGroup, procfs
from dvkernels.communicators.workers.shm import roll_call
from dvkernels.communicators.workers.shm.group_file import GroupFile
from dvkernels.errors import (
    AlgorithmError,
    ClusterError,
    CollectiveTimeoutError,
    ContextError,
    DeviceError,
    WorkerLostError,
)
from dvkernels.reduce_op import ReduceOp


@pytest.fixture
def path():
    found = pathlib.Path(f"/dev/shm/dvkernels-test-{os.getpid()}")
    gc.collect()  # groups of tests before
    yield found
    assert not os.path.lexists(found)


def come(path, rank, size=2, token="secret", seconds=20.0, algorithm="auto"):
    return roll_call.connect(HostGroup(path, rank, size, token), seconds, algorithm)


def comes(path, size, **given):
    return results(*(lambda k=k: come(path, k, size, **given) for k in range(size)))


def told(outcomes, kind, text):
    for error in outcomes:
        assert type(error) is kind, error
        assert text in str(error)


@contextlib.contextmanager
def another_process(act, harm=None):
    """Let a fork act, and come to harm or sleep; end it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            act()
            os.write(writer, b"!")
            time.sleep(60)
        os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_groups_on_one_path_one_after_another_and_at_once(path):
    first, second = comes(path, 3), comes(path, 2)
    for workers in (first, second):
        sums = results(*(lambda w=w: w.reduce([np.full(3, 2.0)], ReduceOp.SUM) for w in workers))
        assert [one.tolist() for one in sums] == [[2.0 * len(workers)] * 3] * len(workers)
    for workers in (*first, *second):
        workers.close()


def test_use_after_the_end(path):
    before = pathlib.Path("/proc/self/maps").read_text().count(str(path))
    workers = comes(path, 2)
    arrays = results(*(lambda w=w: w.empty((9,), np.dtype("f8"), 1) for w in workers))
    workers[0].close()
    workers[0].close()
    assert workers[0].has_ended
    workers[0].announce(ValueError("nobody is told"))
    with pytest.raises(ContextError, match="has closed its strategy"):
        workers[0].barrier()
    with pytest.raises(WorkerLostError, match=r"worker 0 is lost .* it has closed its strategy"):
        workers[1].barrier()
    del workers
    gc.collect()
    arrays[0][0][:] = 5  # arrays keep their memory
    assert arrays[0][0].sum() == 45
    del arrays
    gc.collect()
    assert pathlib.Path("/proc/self/maps").read_text().count(str(path)) == before


def test_a_group_that_is_dropped_has_been_left(path):
    workers = comes(path, 2)
    del workers[0]
    gc.collect()
    with pytest.raises(WorkerLostError, match="it has dropped its strategy"):
        workers[0].barrier()


def test_a_fork_is_no_worker(path):
    workers = comes(path, 2)

    def use():
        with pytest.raises(ContextError, match="was forked from worker 1, and is no worker"):
            workers[1].barrier()
        assert workers[1].has_ended
        workers[1].close()
        workers.clear()
        gc.collect()

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            use()
            os.write(writer, b"!")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    os.waitpid(child, 0)
    results(*(worker.barrier for worker in workers))


def test_cores_are_shared_while_the_group_is(path):
    from dvkernels.devices import cpu

    alone = cpu.usable_cores()
    workers = comes(path, 2)
    assert cpu.usable_cores() == max(1, alone // 2)
    for worker in workers:
        worker.close()
    assert cpu.usable_cores() == alone


def test_no_memory_for_arrays_is_an_error_on_all(path, monkeypatch):
    workers = comes(path, 2)
    original = GroupFile.allocate
    calls = []

    def allocate(self, start, nbytes):
        calls.append(start)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        original(self, start, nbytes)

    monkeypatch.setattr(GroupFile, "allocate", allocate)
    told(
        at_once(*(lambda w=w: w.empty((9,), np.dtype("f8"), 1) for w in workers)),
        DeviceError,
        "did not get 16777216 bytes of shared memory",
    )
    for (array,) in results(*(lambda w=w: w.empty((9,), np.dtype("f8"), 1) for w in workers)):
        array[:] = 1


# -- who gets in ----------------------------------------------------------------------------------


def test_a_file_that_is_not_of_the_group_is_refused(path, tmp_path):
    with pytest.raises(ClusterError, match=r"it cannot be opened: Is a directory"):
        come(tmp_path, 0)
    with pytest.raises(ClusterError, match=r"there is no such folder; give all processes"):
        come(tmp_path / "none" / "group", 0)
    file = tmp_path / "group"
    file.write_bytes(bytes(8192))
    with pytest.raises(ClusterError, match=r"its mode is 644 instead of 600"):
        come(file, 0)
    file.chmod(0o600)
    with pytest.raises(ClusterError, match=r"it is not the file of a group of dvkernels"):
        come(file, 0)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ClusterError, match="it is a symbolic link"):
        come(tmp_path / "link", 0)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ClusterError, match="it is not a file"):
        come(tmp_path / "pipe", 0)
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        with pytest.raises(ClusterError, match="it belongs to user 12345, and this process to"):
            come(file, 0)


def test_another_token_is_refused_and_the_group_goes_on(path):
    def another():
        with pytest.raises(ClusterError, match="it is of another group: their tokens differ"):
            late(path, 1, token="public")
        return come(path, 1)

    workers = results(lambda: come(path, 0), another)
    results(*(worker.barrier for worker in workers))


def entered(path, rank, size):
    """Come, and do not wait for the others."""
    call = roll_call.RollCall.entered(HostGroup(path, rank, size, "secret"), 20.0)
    assert call is not None
    kept.append(call)


kept = []


@pytest.mark.parametrize(
    ("rank", "size", "text"),
    [
        (1, 4, "it says that the group has 4 processes, and others 3"),
        (0, 3, "has come with that rank already"),
    ],
)
def test_one_that_does_not_fit_is_an_error_on_all(path, rank, size, text):
    outcomes = at_once(lambda: come(path, 0, 3), lambda: late(path, rank, size))
    told(outcomes, ClusterError, text)


def late(path, *given, **named):
    while not path.exists():
        time.sleep(1e-3)
    return come(path, *given, **named)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("this_host", "several hosts need MPI"),
        ("this_process_namespace", "another process namespace"),
    ],
)
def test_another_host_and_another_process_namespace(path, name, text, monkeypatch):
    with another_process(lambda: entered(path, 0, 2)):
        monkeypatch.setattr(procfs, name, lambda: 7)
        with pytest.raises(ClusterError, match=text):
            come(path, 1)


def test_too_little_memory_is_an_error_on_all(path, monkeypatch):
    original = GroupFile.allocate

    def allocate(self, start, nbytes):
        if nbytes > 1_000_000:
            raise OSError(28, "No space left on device")
        original(self, start, nbytes)

    monkeypatch.setattr(GroupFile, "allocate", allocate)
    outcomes = at_once(lambda: come(path, 0), lambda: come(path, 1))
    told(outcomes, ClusterError, "2 processes need 3,")


def test_different_algorithms_are_an_error_on_all(path):
    outcomes = at_once(
        lambda: come(path, 0, algorithm="ring"), lambda: come(path, 1, algorithm="exchange")
    )
    told(outcomes, AlgorithmError, "chooses ['ring', 'exchange']")


# -- who does not come ----------------------------------------------------------------------------


def test_a_rank_that_never_comes(path):
    outcomes = at_once(lambda: come(path, 0, 3, seconds=0.3), lambda: come(path, 2, 3))
    told(outcomes, CollectiveTimeoutError, "in vain for ranks [1] of 3 to make their strategy")


def test_a_process_that_is_killed_meanwhile(path):
    with another_process(lambda: entered(path, 1, 3)) as child:
        os.kill(child, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=f"rank 1, process {child}, has ended before"):
            come(path, 0, 3)


def test_a_file_that_killed_processes_have_left_is_removed(path):
    with another_process(lambda: entered(path, 1, 2)):
        pass
    with pytest.raises(WorkerLostError, match=r"rank 1, process .* has ended before all 2 had"):
        come(path, 0)
    for worker in comes(path, 2):
        worker.close()


def test_the_lock_of_a_stopped_process(path):
    def lock():
        entered(path, 0, 2)
        kept.append(kept[0].file.locked(1.0))
        kept[1].__enter__()

    with (
        another_process(lock),
        pytest.raises(CollectiveTimeoutError, match=r"has been locked .* for 0\.2 s"),
    ):
        come(path, 1, seconds=0.2)
    path.unlink()


def test_without_files_without_names(path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    for worker in comes(path, 2):
        worker.close()
    assert not [*path.parent.glob(".dvkernels-*")]


def test_simulated_hosts_need_mpi(path, monkeypatch):
    monkeypatch.setenv("DVKERNELS_HOSTS", "1,1")
    with pytest.raises(ClusterError, match="DVKERNELS_HOSTS simulates several hosts"):
        come(path, 0)


def test_strategies(path):
    def train(rank):
        group = HostGroup(path.name, rank, 2, b"secret")
        with dv.MultiWorkerMirroredStrategy(group, devices=1, timeout_seconds=20) as strategy:
            return strategy.run(lambda: dv.get_replica_context().all_reduce("sum", 1.0)).values

    assert results(lambda: train(0), lambda: train(1)) == [(2.0,), (2.0,)]


INTERRUPTED = """
import os, pathlib, threading
import dvkernels as dv

def strategy(rank, path):
    group = dv.cluster.HostGroup(path, rank, 2, "secret")
    return dv.MultiWorkerMirroredStrategy(group, devices=1, timeout_seconds=3)

def sum_of(made):
    ids = made.distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
    return made.reduce("sum", ids)

with dv.MirroredStrategy(2) as made:
    made.reduce("sum", made.distribute_values_from_function(lambda c: 1))

def make():
    path = pathlib.Path(f"/dev/shm/dvkernels-test-{os.getpid()}")
    told, held = [], []

    def other():
        try:
            with strategy(1, path) as made:
                told.append(sum_of(made))
        except dv.errors.DvKernelsError as error:
            told.append(error)

    beside = threading.Thread(target=other)
    beside.start()

    def act():
        with strategy(0, path) as made:
            assert sum_of(made) == 1

    def check(was_raised):
        beside.join(10)
        assert told, "the other worker still waits"
        assert was_raised or told == [1], told
        assert not path.exists()
        again = threading.Thread(target=other)
        again.start()
        act()
        again.join()
        assert told[1] == 1, told

    return act, check
"""


@pytest.mark.wide  # the other waits for seconds, where one was interrupted before it had come
def test_an_interrupt_leaves_no_file_and_nobody_waiting():
    report = interrupt_points.broken_in(INTERRUPTED, sample=40, seconds_to_end=40)
    assert not report, report.text()
