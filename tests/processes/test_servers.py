"""Servers and workers in processes over shared memory: tables, calls, losses, and the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from host_jobs import outcome, run
from mpi_jobs import Job, is_open_mpi, needs_mpi
from mpi_jobs import run as run_mpi

import dvkernels as dv

PROGRAMS = Path(__file__).with_name("server_programs.py")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("program", "count", "num_servers"),
    [
        ("calls", 4, 1),
        pytest.param("tables", 4, 2, marks=pytest.mark.wide),
        pytest.param("tables", 3, 1, marks=pytest.mark.wide),
        pytest.param("tables", 7, 5, marks=pytest.mark.wide),
        pytest.param("calls", 6, 2, marks=pytest.mark.wide),
    ],
)
def test_laws(program, count, num_servers):
    run(count, program, num_servers, file=PROGRAMS)


@pytest.mark.parametrize("servers", [[2], pytest.param([1, 3, 2], marks=pytest.mark.wide)], ids=str)
def test_a_checkpoint_restores_on_another_number_of_servers(servers, tmp_path):
    for k, num_servers in enumerate(servers):
        run(num_servers + 2, "checkpoints", num_servers, tmp_path, 3 * (k + 1), file=PROGRAMS)


SEEDS = range(20)  # of a campaign


@pytest.mark.parametrize(
    ("num_calls", "seed"),
    [
        (100, 0),
        pytest.param(2000, 0, marks=pytest.mark.wide),
        *(pytest.param(10_000, seed, marks=pytest.mark.slow) for seed in SEEDS),
    ],
)
def test_calls_of_lost_workers_run_on_others(num_calls, seed, tmp_path):
    codes, written = outcome(7, "workers_die", num_calls, tmp_path, seed, file=PROGRAMS)
    assert sorted(codes) == [-signal.SIGKILL] * 3 + [0] * 4, written


@pytest.mark.parametrize(
    ("num_calls", "seed"),
    [
        pytest.param(2000, 0, marks=pytest.mark.wide),
        *(pytest.param(10_000, seed, marks=pytest.mark.slow) for seed in SEEDS),
    ],
)
def test_every_call_ends_once_though_some_fail(num_calls, seed):
    run(5, "calls_fail", num_calls, seed, file=PROGRAMS)


def test_all_processes_refuse_numbers_that_differ():
    run(3, "counts_differ", file=PROGRAMS)


@pytest.mark.wide
@pytest.mark.parametrize("example", ["asynchronous_sgd", "live_counters", "word_vectors"])
def test_examples_have_servers(example, tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "dvkernels", "launch", "-n", "4", "--engine", "local"]
    ended = subprocess.run(
        [*command, EXAMPLES / f"{example}.py", "1"],
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert "server 3: " in ended.stdout or example == "word_vectors"


@pytest.mark.parametrize(
    ("program", "others"),
    [
        ("server_dies", [0, -signal.SIGKILL]),
        pytest.param("all_workers_die", [-signal.SIGKILL, 0], marks=pytest.mark.wide),
        pytest.param("coordinator_fails", [0, 0], marks=pytest.mark.wide),
        pytest.param("coordinator_dies", [1, 1], marks=pytest.mark.wide),
        pytest.param("call_never_ends", [0, 0], marks=pytest.mark.wide),
        pytest.param("interrupted", [0, 0], marks=pytest.mark.wide),
    ],
)
def test_a_loss_is_an_error_with_names_and_no_wait(program, others):
    codes, written = outcome(3, program, file=PROGRAMS)
    assert codes[1:] == others, written
    expected = {"coordinator_dies": -signal.SIGKILL, "coordinator_fails": 1}
    assert codes[0] == expected.get(program, 0), written


@pytest.mark.wide
@pytest.mark.parametrize(
    ("program", "hosts"), [("tables", ""), ("tables", "2,2"), ("calls", "2,2")]
)
class TestOverMpi:
    pytestmark = needs_mpi

    def test_laws(self, program, hosts):
        run_mpi(4, program, 1, environ={"DVKERNELS_HOSTS": hosts} if hosts else {}, file=PROGRAMS)


@pytest.mark.wide
class TestLossesOverMpi:
    pytestmark = needs_mpi

    @pytest.mark.parametrize("hosts", ["", "2,2"])
    @pytest.mark.parametrize("goes_on", [True, False])
    def test_a_worker_is_lost(self, hosts, goes_on, tmp_path):
        if goes_on and not is_open_mpi():
            pytest.skip("only Open MPI goes on without a lost process")
        options = ["--with-ft", "ulfm"] if goes_on else []
        environ = {"DVKERNELS_HOSTS": hosts} if hosts else {}
        job = Job(4, "worker_dies", tmp_path, environ=environ, file=PROGRAMS, options=options)
        outcome = job.wait(60)
        if goes_on:
            assert "survived" in outcome.written, outcome.written
        else:  # the launcher ends the job
            assert outcome.code != 0, outcome.written


@pytest.mark.wide
def test_a_launched_function_has_servers():
    def program():
        with dv.ParameterServerStrategy(num_servers=1) as strategy:
            with strategy.scope():
                total = dv.Variable(0)
            coordinator = dv.ClusterCoordinator(strategy)
            for _ in range(10):
                coordinator.schedule(total.assign_add, (2,))
            coordinator.join()
            return int(total)

    assert dv.launch(program, workers=4) == [20, None, None, None]
