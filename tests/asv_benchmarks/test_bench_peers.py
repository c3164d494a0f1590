"""bench beside other libraries: those that are missing are skipped, those that run are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from peers import main

QUICK = ["--sizes", "64,4K", "--rounds", "2"]
PEERS = Path(__file__).resolve().parents[2] / "asv_benchmarks"


def bench(capsys, *arguments):
    status = main.main(["bench", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.wide
def test_a_peer_that_is_missing_is_skipped_with_the_reason(capsys):
    python = f"mpich={sys.executable}"
    status, out, _ = bench(capsys, *QUICK, "--peers", "mpich", "--peer-python", python)
    assert status == 0
    assert "mpich: skipped: mpich is not installed (pip install numpy mpi4py mpich" in out


def test_numpy_and_jax_are_measured_beside_ours(capsys):
    pytest.importorskip("jax")
    status, out, _ = bench(capsys, *QUICK, "--peers", "numpy", "jax", "--json")
    assert status == 0
    found = json.loads(out)
    assert all(set(one["peers"]) == {"numpy", "jax"} for one in found["results"])
    assert found["peers"]["numpy"].startswith(f"numpy {np.__version__}")
    assert found["peers"]["jax"].startswith("jax ")
    assert found["command"].startswith("python -m peers bench")


@pytest.mark.parametrize(
    "arguments", [["--peers", "horovod"], ["--peers", "--peer-python", "mpich"]]
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    status, _, err = bench(capsys, *arguments)
    assert status == 2
    assert err.startswith("error: bench: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.wide
def test_an_interrupt_ends_the_peers(tmp_path):
    # A stand-in for a peer's interpreter: it prints a version, then hangs like a stuck rank.
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/sh\nif [ $1 = -c ]; then echo 1.0; exit; fi\n"
        f"echo $$ > {tmp_path}/pid; exec sleep 600\n"
    )
    stand_in.chmod(0o755)
    command = [sys.executable, "-m", "peers", "bench", "--sizes", "4", "--peers", "jax"]
    with subprocess.Popen([*command, "--peer-python", f"jax={stand_in}"], cwd=PEERS) as process:
        end = time.monotonic() + 60
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
    end = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
