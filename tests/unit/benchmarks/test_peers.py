"""The workers of those peers that are installed, and what they share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dvkernels.benchmarks.failures import ContestantLostError
from dvkernels.benchmarks.peers import bootstrap, protocol, registry


@pytest.mark.parametrize("name", registry.PEERS)
def test_a_peer_that_is_here_sums_right_and_leaves(name):
    try:
        worker = registry.start(name, None, 2, 60)
    except ContestantLostError as error:
        pytest.skip(str(error))
    pid = worker._process.pid
    try:
        for count in (1, 1003):
            wrong = worker.ask(do="prepare", count=count, dtype="float32", seed=1)["wrong"]
            assert wrong == dict.fromkeys(worker.ready["variants"], 0)
        for variant in wrong:
            assert worker.ask(do="run", variant=variant, calls=3)["seconds"] > 0
    finally:
        worker.close()
    assert not psutil.pid_exists(pid)


class LastElementIsLost:
    """A sum that two processes compute, one of them wrongly."""

    variants = ("right", "wrong")

    def prepare(self, count, dtype, seed):
        parts = [np.empty(count, dtype) for _ in range(2)]
        for replica, part in enumerate(parts):
            protocol.inputs.fill(part, "sum", seed, replica)
        self.sum = parts[0] + parts[1]

    def call_once(self, variant):
        result = self.sum.copy()
        if variant == "wrong":
            result[-1] = 0
        return [result]

    def seconds(self, variant, num_calls):
        return num_calls * 1e-3


def test_a_worker_checks_itself():
    actor = protocol.Actor(LastElementIsLost(), 2)
    message = {"do": "prepare", "count": 10, "dtype": "float64", "seed": 3}
    assert actor.act(message) == {"wrong": {"right": 0, "wrong": 1}}
    assert actor.act({"do": "check"}) == {"wrong": {"right": 0, "wrong": 1}}
    assert actor.act({"do": "run", "variant": "right", "calls": 5}) == {"seconds": 5e-3}


def test_the_slowest_process_counts():
    assert protocol._joined([{"seconds": 1}, {"seconds": 3}, {"seconds": 2}]) == {"seconds": 3}
    assert protocol._joined([{"wrong": {"a": 1}}, {"wrong": {"a": 2}}]) == {"wrong": {"a": 3}}


NO_MORE_THAN_NUMPY = """
import runpy, sys
names = runpy.run_path(sys.argv[1], run_name="bootstrap")
import importlib
def load(name):
    class Module:
        @staticmethod
        def main():
            print("here, not in the lines")
    __import__(name)
    return Module
importlib.import_module = load
for module in ("gloo", "mpi", "psum", "mirrored"):
    sys.argv[1:] = ["dvkernels.benchmarks.peers." + module, "2"]
    names["main"]()
loaded = {name.split(".")[0] for name in sys.modules}
assert "numpy" in loaded
assert not loaded & {"numba", "optree", "ml_dtypes", "torch", "jax", "mpi4py"}, loaded
"""


def test_workers_need_numpy_only():
    done = subprocess.run(
        [sys.executable, "-c", NO_MORE_THAN_NUMPY, bootstrap.__file__],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_what_a_library_prints_does_not_come_between():
    code = (
        "import sys, os\n"
        "from dvkernels.benchmarks.peers import protocol\n"
        "line = protocol.Line()\n"
        "print('noise')\n"
        "os.system('echo noise')\n"
        "line.say({'is': line.hear()})\n"
        "assert line.hear() == {'do': 'end'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='{"a": 1}\n',
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    assert json.loads(done.stdout) == {"is": {"a": 1}}, done.stderr
    assert "noise" in done.stderr


def test_a_command_that_takes_too_long_ends_the_worker():
    code = (
        "import time\n"
        "from dvkernels.benchmarks.peers import protocol\n"
        "class Sleeps:\n"
        "    variants = ('a',)\n"
        "    def seconds(self, variant, num_calls): time.sleep(60)\n"
        "protocol.Actor(Sleeps(), 2).act("
        "{'do': 'run', 'variant': 'a', 'calls': 1, 'deadline': 0.3})\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "in seconds" in done.stderr
    assert time.monotonic() - began < 30
