"""Each kind of launcher is recognised, and gets the arguments that it needs."""

from __future__ import annotations

import shlex
import stat
import sys

import pytest

from dvkernels.errors import LaunchError
from dvkernels.launcher import commands
from dvkernels.launcher.job_description import HostSlots, Job

FLAVOURS = {flavour.name: flavour for flavour in commands.FLAVOURS}
KEPT = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "33554432"}
# Recorded output of --version, and the kind of the launcher.
VERSIONS = {
    "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/": (
        "Open MPI"
    ),
    "mpiexec (OpenRTE) 4.1.4": "Open MPI",
    "HYDRA build details:\n    Version:                                 5.0.2": "MPICH",
    "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626": "Intel MPI",
    "slurm 23.11.4": "srun",
    "slurm-wlm 22.05.8": "srun",
}


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(("version", "name"), VERSIONS.items())
def test_a_launcher_is_recognised_by_its_version(tmp_path, version, name):
    path = executable(tmp_path / "mpiexec", f"#!/bin/sh\necho {shlex.quote(version)}\n")
    assert commands.flavour_of(path).name == name


@pytest.mark.parametrize("text", ["#!/bin/sh\necho hello\n", "#!/bin/sh\nexit 1\n", "no program"])
def test_an_unknown_launcher_is_named_in_the_error(tmp_path, text):
    path = executable(tmp_path / "mpiexec", text)
    with pytest.raises(LaunchError, match=path):
        commands.flavour_of(path)


def test_the_launcher_of_the_interpreters_environment_comes_first(tmp_path, monkeypatch):
    own_folder, elsewhere = tmp_path / "env" / "bin", tmp_path / "bin"
    own_folder.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "executable", str(own_folder / "python"))
    environ = {"PATH": str(elsewhere)}
    with pytest.raises(LaunchError, match="none of mpiexec, mpirun, srun is in the folder of"):
        commands.find(None, environ)
    srun = executable(elsewhere / "srun", "")
    assert commands.find(None, environ) == srun
    mpiexec = executable(elsewhere / "mpiexec", "")
    assert commands.find(None, environ) == mpiexec
    assert commands.find("srun", environ) == commands.find(None, environ, commands.SLURM) == srun
    own = executable(own_folder / "mpiexec", "")
    assert commands.find(None, environ) == own
    assert commands.find(srun, environ) == srun


HOSTS = (HostSlots("a", 2), HostSlots("b", 2))
# "plain", "bound" to two cores each, more workers than cores, and on two hosts.
JOBS = {
    "plain": Job(("prog", "x"), 4, prefixed=False),
    "bound": Job(("prog",), 2, num_threads=2, bound=True, prefixed=False),
    "crowded": Job(("prog",), 4, num_threads=1, oversubscribed=True, as_root=True, prefixed=False),
    "hosts elsewhere": Job(("prog",), 4, exported_variables=("OMP_NUM_THREADS",), prefixed=False),
    "default binding": Job(("prog",), 4, num_threads=2, bound=None, prefixed=False),
    "hosts": Job(
        ("prog",),
        4,
        HOSTS,
        exported_variables=("PYTHONPATH",),
        launcher_options=("--more",),
        prefixed=False,
    ),
}
COMMANDS = {
    # Where a host file names the hosts, variables must be exported to them too.
    ("Open MPI", "hosts elsewhere"): (
        "-n 4 -x OMP_NUM_THREADS --map-by slot:HWTCPUS --bind-to none prog"
    ),
    ("Open MPI", "plain"): "-n 4 --map-by slot:HWTCPUS --bind-to none prog x",
    ("Open MPI", "bound"): "-n 2 --map-by slot:PE=2:HWTCPUS --bind-to hwthread prog",
    ("Open MPI", "crowded"): (
        "-n 4 --allow-run-as-root --map-by slot:OVERSUBSCRIBE --bind-to none prog"
    ),
    ("Open MPI", "hosts"): (
        "-n 4 --host a:2,b:2 -x PYTHONPATH --map-by slot:HWTCPUS --bind-to none --more prog"
    ),
    ("MPICH", "plain"): "-n 4 -bind-to none prog x",
    ("MPICH", "bound"): "-n 2 -bind-to hwthread:2 prog",
    ("MPICH", "crowded"): "-n 4 -bind-to none prog",
    ("MPICH", "hosts"): "-hosts a:2,b:2 -n 4 -bind-to none --more prog",
    ("Intel MPI", "plain"): "-genv I_MPI_PIN 0 -n 4 prog x",
    ("Intel MPI", "bound"): "-genv I_MPI_PIN_DOMAIN 2 -n 2 prog",
    ("Intel MPI", "crowded"): "-genv I_MPI_PIN 0 -n 4 prog",
    ("Intel MPI", "hosts"): "-genv I_MPI_PIN 0 --more -host a -n 2 prog : -host b -n 2 prog",
    ("srun", "plain"): "--ntasks=4 --kill-on-bad-exit=1 --cpu-bind=none prog x",
    ("srun", "bound"): "--ntasks=2 --kill-on-bad-exit=1 --cpus-per-task=2 --cpu-bind=cores prog",
    ("srun", "crowded"): "--ntasks=4 --kill-on-bad-exit=1 --cpus-per-task=1 --cpu-bind=none prog",
    # Slurm binds tasks to their allocation by default.
    ("srun", "default binding"): "--ntasks=4 --kill-on-bad-exit=1 --cpus-per-task=2 prog",
    ("MPICH", "default binding"): "-n 4 -bind-to none prog",
    ("srun", "hosts"): (
        "--ntasks=4 --kill-on-bad-exit=1 --nodelist=a,b --ntasks-per-node=2 --cpu-bind=none "
        "--more prog"
    ),
}


@pytest.mark.parametrize(("name", "job"), COMMANDS)
def test_the_command(name, job):
    command = commands.command("/bin/mpiexec", FLAVOURS[name], JOBS[job])
    assert shlex.join(command) == f"/bin/mpiexec {COMMANDS[name, job]}"


def test_srun_needs_equal_counts():
    job = Job(("prog",), 3, (HostSlots("a", 2), HostSlots("b", 1)))
    with pytest.raises(LaunchError, match="got a:2,b:1: give equal counts"):
        commands.command("srun", FLAVOURS["srun"], job)


def test_the_prefix_script_gets_the_rank_variable():
    command = commands.command("mpiexec", FLAVOURS["Open MPI"], Job(("prog",), 1))
    assert command[-2:] == ["OMPI_COMM_WORLD_RANK", "prog"]


def test_the_mpi_operators_variables_are_renamed_for_open_mpi_5():
    given = {"OMPI_MCA_orte_default_hostfile": "/f", "OMPI_MCA_orte_keep_fqdn_hostnames": "true"}
    added = commands.environment(None, given)
    assert added["PRTE_MCA_prte_default_hostfile"] == "/f"
    assert added["PRTE_MCA_prte_keep_fqdn_hostnames"] == "true"
    own = commands.environment(None, {**given, "PRTE_MCA_prte_default_hostfile": "/g"})
    assert "PRTE_MCA_prte_default_hostfile" not in own


@pytest.mark.parametrize("chosen", [*KEPT, "GLIBC_TUNABLES"])
def test_workers_keep_freed_memory_unless_the_user_has_chosen(chosen):
    assert commands.environment(None, {}).items() >= KEPT.items()
    assert commands.environment(None, {chosen: "1"}).keys().isdisjoint(KEPT)


def test_threads_are_set_unless_the_user_has_set_them():
    added = commands.environment(3, {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **KEPT})
    assert set(added.values()) == {"3"}
    assert "DVKERNELS_NUM_THREADS" in added
    assert "OMP_NUM_THREADS" not in added
