"""launch starts, supervises and ends a job, here under the fake launcher of fake_mpiexec.py.

tests/processes/test_launched_programs.py runs the launchers of real MPIs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kinds import daily

from dvkernels.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fake launcher needs Linux")


def test_every_line_starts_with_the_workers_number(launch, script):
    program = script("print('a', rank)\nprint('b', rank, sys.argv[1:], end='', file=sys.stderr)")
    status, out, err = launch("-n", "3", program, "-x", "--y=1")
    assert status == 0
    assert sorted(out.splitlines()) == [f"[{rank}] a {rank}" for rank in range(3)]
    assert sorted(err.splitlines()) == [f"[{rank}] b {rank} ['-x', '--y=1']" for rank in range(3)]


def test_only_the_first_worker_reads_the_input_of_launch(start, script):
    # The fake launcher gives its own input to all workers, and the input never ends.
    source, target = os.pipe()
    os.write(target, b"hello\n")
    program = script("print(repr(sys.stdin.readline()), flush=True)")
    process = start("-n", "3", program, stdin=source)
    out, err = process.communicate(timeout=SECONDS)
    os.close(source)
    os.close(target)
    assert sorted(out.splitlines()) == ["[0] 'hello\\n'", "[1] ''", "[2] ''"], err


READS = """
import hashlib
text = sys.stdin.buffer.read() if sys.stdin else b""
print(len(text), hashlib.sha256(text).hexdigest(), flush=True)
"""
# How a shell gives 3 MB of random bytes, and whether the first worker reads them.
INPUTS = {
    'exec "$@" < input': True,
    'cat input | "$@"': True,
    'exec "$@" < /dev/null': False,
    'exec "$@" <&-': False,
}


@pytest.mark.parametrize("shell", daily(INPUTS, 'cat input | "$@"', 'exec "$@" <&-'))
def test_an_input_of_any_size_and_kind_is_read_whole(start, script, tmp_path, shell):
    text = os.urandom(3_000_000)
    (tmp_path / "input").write_bytes(text)
    process = start("-n", "2", script(READS), shell=shell)
    out, err = process.communicate(timeout=SECONDS)
    given = text if INPUTS[shell] else b""
    assert sorted(out.splitlines()) == [
        f"[{rank}] {len(read)} {hashlib.sha256(read).hexdigest()}"
        for rank, read in enumerate((given, b""))
    ], err


def test_a_program_that_does_not_read_is_not_disturbed(start, script, tmp_path):
    (tmp_path / "input").write_bytes(b"y" * 1_000_000)
    with open(tmp_path / "input", "rb") as file:
        process = start("-n", "2", script("print('done')"), stdin=file)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, sorted(out.splitlines())) == (0, ["[0] done", "[1] done"]), err


def test_output_is_bytes_of_any_kind_and_length(launch, script):
    long = "sys.stdout.buffer.write(b'x' * 3_000_000 + b'\\xff\\x00\\n')"
    status, out, _ = launch("-n", "1", script(long), encoding="latin-1")
    assert status == 0
    assert out.replace("\n[0] ", "").replace("[0] ", "") == "x" * 3_000_000 + "\xff\x00\n"


def test_lines_stay_whole(launch, script):
    # Many lines at once: more than a pipe writes atomically for one of several writers.
    program = script("for k in range(300):\n    print(k, 'x' * 500)")
    _, out, _ = launch("-n", "3", program)
    expected = {f"[{rank}] {k} {'x' * 500}" for rank in range(3) for k in range(300)}
    assert len(out.splitlines()) == 900
    assert set(out.splitlines()) == expected


def test_without_a_prefix_output_is_as_it_was(launch, script):
    assert launch("-n", "1", "--no-prefix", script("print('a')"))[:2] == (0, "a\n")


def test_a_module_is_started_too(launch):
    status, out, _ = launch("-n", "2", "-m", "platform", "--nonaliased")
    assert status == 0
    assert [line[:4] for line in sorted(out.splitlines())] == ["[0] ", "[1] "]


def test_workers_know_their_place_share_and_threads(launch, script):
    program = script(
        "import dvkernels as dv\n"
        "r = dv.cluster.default_resolver()\n"
        "print(r.worker_id, r.num_workers, r.local_rank, os.environ['OMP_NUM_THREADS'],"
        " len(dv.list_devices()))"
    )
    cores = len(os.sched_getaffinity(0))
    num_workers = 2 * cores  # more than there are cores
    status, out, err = launch("-n", str(num_workers), program)
    assert status == 0, err
    expected = sorted(f"[{k}] {k} {num_workers} {k} 1 1" for k in range(num_workers))
    assert sorted(out.splitlines()) == expected
    _, out, _ = launch("-n", "1", "--threads-per-worker", "7", program)
    assert out.split()[4] == "7"
    _, out, _ = launch("-n", "1", program, OMP_NUM_THREADS="5")
    assert out.split()[4] == "5"


def test_info_of_several_workers_shows_their_hosts_and_cores(launch):
    status, out, err = launch("-n", "2", "-m", "dvkernels", "info")
    assert status == 0, err
    lines = sorted(out.splitlines())
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"[{rank}] worker {rank} of 2, {rank} of 2 on {platform.node()}, ")
        assert " (Hydra): cpu:0" in line
        assert line.endswith(" PASS")


def test_info_shows_simulated_hosts(launch):
    status, out, err = launch("-n", "3", "-m", "dvkernels", "info", DVKERNELS_HOSTS="2,1")
    assert status == 0, err
    lines = [line for line in sorted(out.splitlines()) if " worker " in line]
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        here = f"{rank} of 3 on {platform.node()}, as if on host {int(rank > 1)} of 2, "
        assert line.startswith(f"[{rank}] worker {rank} of 3, {here}")


ENDS = {
    "sys.exit(3)": (3, ""),
    "sys.exit('the last word')": (1, "[1] the last word\n"),
    "os.kill(os.getpid(), signal.SIGKILL)": (9, ""),
    "raise ValueError('this one')": (1, "[1] ValueError: this one\n"),
    "import no_such_module": (1, "ModuleNotFoundError"),
}


@pytest.mark.parametrize("end", daily(ENDS, "sys.exit('the last word')", "import no_such_module"))
def test_one_status(launch, script, end):
    status, words = ENDS[end]
    program = script(f"if rank == 1:\n    {end}")
    found, _, err = launch("-n", "2", program)
    assert found == status
    assert words in err
    assert f"launch: MPICH ended with status {status}" in err


def test_a_worker_that_fails_before_mpi_was_started_ends_those_that_wait(launch, script):
    program = script("if rank == 1:\n    raise ValueError('early')\ntime.sleep(100)")
    started = time.monotonic()
    status, _, err = launch("-n", "3", program)
    assert status == 1
    assert "[1] ValueError: early" in err
    assert "runpy" not in err
    assert time.monotonic() - started < 50


def test_restarts_count_and_end(launch, script):
    program = script("print('attempt', os.environ['DVKERNELS_ATTEMPT'], flush=True)\nos._exit(7)")
    status, out, err = launch("-n", "1", "--max-restarts", "2", program)
    assert status == 7
    assert out.splitlines() == [f"[0] attempt {k}" for k in range(3)]
    assert err.count("starting again") == 2
    again = script("os._exit(7 * (os.environ['DVKERNELS_ATTEMPT'] == '4'))")
    assert launch("-n", "1", "--max-restarts", "2", again, DVKERNELS_ATTEMPT="4")[0] == 0


@pytest.mark.parametrize("status", daily([0, 2, 42, 130, 141], 0, 42))
def test_jobs_with_a_final_status_are_not_restarted(launch, script, status):
    found, _, err = launch("-n", "1", "--max-restarts", "2", script(f"os._exit({status})"))
    assert found == status
    assert "starting again" not in err


def test_open_mpi_in_a_slurm_job_of_several_nodes_gives_a_warning(launch, tmp_path):
    mpiexec = tmp_path / "mpirun"
    mpiexec.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 5.0.11'\n")
    mpiexec.chmod(0o755)
    for nodes, is_warned in (("2", True), ("1", False)):
        words = ("--launcher", str(mpiexec), "-m", "platform")
        status, _, err = launch(*words, SLURM_JOB_NUM_NODES=nodes)
        assert status == 0
        assert ("use --launcher srun" in err) == is_warned


SLURM = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}


@pytest.mark.parametrize(
    ("variables", "num_workers"),
    [
        ({"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "3,2"}, 5),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, 5),  # sbatch --nodes=3 --exclusive
    ],
)
def test_a_slurm_job_sets_the_number_of_workers_and_threads(launch, variables, num_workers):
    status, out, err = launch("--dry-run", "-m", "x", **SLURM, **variables)
    assert status == 0, err
    assert f"-n {num_workers} -bind-to none" in out
    assert "OMP_NUM_THREADS=3" in out
    assert (
        "OMP_NUM_THREADS=1" in launch("--dry-run", "--threads-per-worker=1", "-m", "x", **SLURM)[1]
    )


def test_a_wrong_variable_of_slurm_is_named(launch):
    status, _, err = launch("--dry-run", "-m", "x", SLURM_JOB_ID="7", SLURM_NTASKS="none")
    assert status == 2
    assert "SLURM_NTASKS: expected an integer from 1; got 'none'" in err


GRACEFUL = """
def leave(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(int(sys.argv[1]))

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)
def once(number, frame):
    print("got SIGUSR1", flush=True)
    signal.signal(signal.SIGUSR1, leave)

signal.signal(signal.SIGUSR1, once)
print("up", flush=True)
while True:
    time.sleep(0.01)
"""
LEAVING_SOMETHING = """
import subprocess
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True
)
print("up", child.pid, os.getpid(), flush=True)
"""
STUBBORN = LEAVING_SOMETHING + "time.sleep(1000)"


def read_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    return sorted(process.stdout.readline() for _ in range(count))


def pids_in(lines: list[str]) -> list[int]:
    return [int(word) for line in lines for word in line.split()[2:]]


def all_gone(pids: list[int]) -> bool:
    """Wait until all processes have ended, zombies included; return whether they have."""

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    ("sent", "asked", "status"),
    daily(
        [
            (signal.SIGTERM, 0, 0),
            (signal.SIGTERM, 42, 42),
            (signal.SIGINT, 0, 0),
            (signal.SIGUSR1, 42, 42),
        ],
        (signal.SIGTERM, 42, 42),
        (signal.SIGINT, 0, 0),
    ),
)
def test_signals_reach_the_workers(start, script, sent, asked, status):
    process = start("-n", "2", "--max-restarts", "3", script(GRACEFUL), str(asked))
    assert read_lines(process, 2) == ["[0] up\n", "[1] up\n"]
    process.send_signal(signal.SIGUSR1)
    assert read_lines(process, 2) == ["[0] got SIGUSR1\n", "[1] got SIGUSR1\n"]
    process.send_signal(sent)
    out, err = process.communicate(timeout=SECONDS)
    assert f"got {sent.name}" in out
    assert process.returncode == status
    assert "starting again" not in err


@pytest.mark.parametrize("sent", daily([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_ends_a_program_without_handlers(start, script, sent):
    process = start("-n", "2", script("print('up', flush=True)\ntime.sleep(1000)"))
    read_lines(process, 2)
    process.send_signal(sent)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + sent


@pytest.mark.parametrize(
    "how", daily(["timeout", "interrupt", "interrupt twice"], "interrupt twice")
)
def test_workers_that_ignore_signals_are_killed_with_all_they_started(start, script, how):
    options = {
        "timeout": ["--timeout", "6", "--grace", "0.1"],
        "interrupt": ["--grace", "0.1"],
        "interrupt twice": ["--grace", "1000"],
    }
    process = start("-n", "2", "--max-restarts", "3", *options[how], script(STUBBORN))
    pids = pids_in(read_lines(process, 2))
    assert len(pids) == 4
    for _ in range({"timeout": 0, "interrupt": 1, "interrupt twice": 2}[how]):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=SECONDS)
    assert process.returncode == (124 if how == "timeout" else 130)
    assert all_gone(pids)


def test_processes_that_a_worker_leaves_behind_are_ended(launch, script):
    status, out, _ = launch("-n", "2", script(LEAVING_SOMETHING))
    assert status == 0
    assert all_gone(pids_in(out.splitlines()))


def test_dry_run_prints_a_command_for_a_shell(launch, script, mpiexec):
    program = script("print(rank, sys.argv[1:])")
    status, out, _ = launch("-n", "2", "--dry-run", program, "a b", "$x", "'")
    assert status == 0
    words = shlex.split(out)
    assert words[0] == "env"
    assert words[words.index(mpiexec) + 1 : words.index(mpiexec) + 3] == ["-n", "2"]
    ran = subprocess.run(
        ["sh", "-c", out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    expected = repr(["a b", "$x", "'"])
    assert sorted(ran.stdout.splitlines()) == [f"[0] 0 {expected}", f"[1] 1 {expected}"]


@pytest.mark.parametrize(
    ("hosts", "workers", "given"),
    [
        (["--hosts", "a:2,b"], None, "or all with counts"),
        (["--hosts", "a,,b"], None, "--hosts: expected hosts"),
        (["--hosts", "a:0"], None, "--hosts: expected hosts"),
        (["--hosts", "a,a"], None, "each host once"),
        (["-n", "3", "--hosts", "a:1,b:1"], None, "counts 2 workers, but -n is 3"),
        (["--hosts", "a:2,b:1"], "a:2,b:1", "-n 3"),
        (["-n", "5", "--hosts", "a,b"], "a:3,b:2", "-n 5"),
        (["-n", "1", "--hosts", "a,b"], "a:1", "-n 1"),
        (["--hosts", "[fe80::1]:2"], "[fe80::1]:2", "-n 2"),
    ],
)
def test_hosts(mpiexec, capsys, hosts, workers, given):
    status = main(["launch", "--launcher", mpiexec, "--dry-run", *hosts, "-m", "x"])
    out, err = capsys.readouterr()
    if workers is None:
        assert (status, out) == (2, "")
        assert given in err
    else:
        assert f"-hosts {workers} {given}" in out.replace("'", "")
        assert "OMP_NUM_THREADS" not in out  # the cores of other hosts are unknown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a script"),
        (["no_such_file.py"], "there is no file 'no_such_file.py'"),
        (["--launcher", "/no/such", "-m", "x"], "none of /no/such is in the folder of"),
        (["-n", "1000000", "--bind", "-m", "x"], "--bind: 1000000 workers"),
        (["-n", "0", "-m", "x"], "expected a number of at least 1"),
        (["--timeout", "-1", "-m", "x"], "expected seconds of at least 0"),
    ],
)
def test_bad_options(mpiexec, capsys, words, message):
    try:
        status = main(["launch", "--launcher", mpiexec, *words])
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err
