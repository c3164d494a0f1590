"""Two processes under jax.distributed, on the loopback device, with CPU collectives (Gloo)."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.jax, pytest.mark.wide]

_JOB = Path(__file__).with_name("jax_job.py")


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX")
@pytest.mark.parametrize("count", [1, 2])  # with one device XLA runs in the thread that launches
def test_two_processes_are_one_strategy_until_one_is_lost(tmp_path, count):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", _JOB, str(rank), port, tmp_path, str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all("all parts" in each for each in said), "\n".join(said)
    assert started[0].returncode == 0, said[0]
    assert said[0].splitlines()[-1] == "lost"
