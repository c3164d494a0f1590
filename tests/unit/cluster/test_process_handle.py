"""Handles of processes: alive, ended, not waited for, and of a process whose id is used again."""

from __future__ import annotations

import gc
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from dvkernels.cluster import procfs
from dvkernels.cluster.process_handle import ProcessHandle

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")


@pytest.fixture(params=["descriptor", "start time"])
def handle(request, monkeypatch):
    if request.param == "start time":
        monkeypatch.delattr(os, "pidfd_open")
    return lambda pid: ProcessHandle(pid, procfs.start_time_of(pid))


def test_a_process_lives_until_it_ends_and_not_until_it_is_waited_for(handle):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    found = handle(child.pid)
    assert found.is_alive()
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not found.is_alive()
    child.wait()
    assert not found.is_alive()
    assert not ProcessHandle(child.pid, 7).is_alive()


def test_a_later_process_of_the_same_id_is_another(handle):
    assert handle(os.getpid()).is_alive()
    assert not ProcessHandle(os.getpid(), procfs.start_time_of(os.getpid()) - 1).is_alive()


def test_no_descriptor_is_left(handle):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert handle(os.getpid()).is_alive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_several_threads_ask_at_once(handle):
    found = handle(os.getpid())
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: found.is_alive(), range(4000)))
