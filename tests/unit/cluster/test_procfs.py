"""Parents, descendants, states and environments of processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dvkernels.cluster import procfs

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")


def test_a_child_and_its_child():
    program = "import sys; sys.stdin.read()"
    shell = subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -c "{program}"; true'],
        stdin=subprocess.PIPE,
        env={**os.environ, "DVKERNELS_TEST": "a=b"},
    )
    try:
        while not (grandchildren := procfs.descendants_of(shell.pid)):
            pass
        below = procfs.descendants_of(os.getpid())
        assert {shell.pid, *grandchildren} <= {*below}
        assert procfs.parent_of(shell.pid) == os.getpid()
        assert [procfs.parent_of(pid) for pid in grandchildren] == [shell.pid]
        assert procfs.environment_of(shell.pid)["DVKERNELS_TEST"] == "a=b"
    finally:
        shell.communicate()
    assert shell.pid not in procfs.descendants_of(os.getpid())


def test_a_process_that_does_not_exist():
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # ended, but not yet waited for
    assert procfs.parent_of(ended.pid) == 0
    ended.wait()
    assert procfs.environment_of(ended.pid) is None
