"""Benchmark of worker processes: it measures every case, and MPI itself for comparison."""

from __future__ import annotations

import json
import sys

import mpi_jobs
import pytest
from peers import jobs, main


def test_without_an_mpi_there_is_nothing_to_measure(capsys):
    assert main.main(["bench-workers", "--rounds", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected an MPI" in line
    assert "--peer-python mpich=PATH" in line


@mpi_jobs.needs_mpi[1]
@mpi_jobs.needs_mpi[0]
@pytest.mark.parametrize("num_processes", [2, 4])
def test_every_case_is_measured(num_processes, monkeypatch, tmp_path):
    for name in ("_OF_TWO", "_OF_FOUR"):
        short = {
            case: given._replace(length=min(given.length, 70_000), iterations=2)
            for case, given in getattr(jobs, name).items()
        }
        monkeypatch.setattr(jobs, name, short)
    mpi = "openmpi" if mpi_jobs.is_open_mpi() else "mpich"
    path = tmp_path / "found.json"
    arguments = ["--rounds", "1", "--processes", str(num_processes), "--json", str(path)]
    assert main.main(["bench-workers", *arguments, "--peer-python", f"{mpi}={sys.executable}"]) == 0
    results = json.loads(path.read_text())["results"]
    assert {one["case"] for one in results} == {*jobs.cases(num_processes)}
    assert {"dvkernels", mpi} <= {one["who"] for one in results}
    assert all(one["seconds_per_call"] > 0 for one in results)


@mpi_jobs.needs_mpi[1]
@mpi_jobs.needs_mpi[0]
@pytest.mark.parametrize(("count", "over"), [(2, "1,1"), (3, "1,1,1")])
def test_the_network_between_hosts_is_calibrated(count, over):
    mpi_jobs.run(count, "calibrate", over)
