"""``launch`` with the installed MPI, beside this interpreter or else in PATH, and without one."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import dvkernels as dv
from dvkernels.errors import LaunchError
from dvkernels.launcher import commands

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 100
SEARCH_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

# The part of mpi4py that programs here use, for workers without MPI.
STAND_IN = """
import dvkernels as dv

strategy = dv.MultiWorkerMirroredStrategy(devices=1)
workers = strategy.distribute_values_from_function(lambda context: 0).owner.workers

class MPI:
    COMM_TYPE_SHARED = 0

    class COMM_WORLD:
        rank, size = getattr(workers, "rank", 0), workers.size
        Barrier = workers.barrier
        allreduce = staticmethod(lambda value: sum(workers.exchange(value)))
        Split_type = classmethod(lambda cls, kind: cls)
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("mpi", marks=pytest.mark.mpi),
        pytest.param("local", marks=pytest.mark.wide),
    ],
)
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def flavour(engine):
    """Return the flavour of the launcher."""
    if engine == "local":
        return engine
    pytest.importorskip("mpi4py")
    try:
        return commands.flavour_of(commands.find(None, os.environ)).name
    except LaunchError as error:
        pytest.skip(str(error))


@pytest.fixture
def start(engine, flavour, tmp_path):
    """Return a function that starts ``launch`` with the text of a program."""
    started = []

    def start(text: str, *words: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        program = tmp_path / "program.py"
        program.write_text("import os, signal, sys, time\n" + text)
        if engine == "local":
            (tmp_path / "mpi4py.py").write_text(STAND_IN)
        command = [sys.executable, "-m", "dvkernels", "launch", "--engine", engine]
        process = subprocess.Popen(
            [*command, "--timeout", "90", *words, str(program)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": SEARCH_PATH},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start):
    def launch(text: str, *words: str) -> tuple[int, str, str]:
        process = start(text, *words)
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out, err

    return launch


PLACE = """
from mpi4py import MPI
import dvkernels as dv
world = MPI.COMM_WORLD
here = world.Split_type(MPI.COMM_TYPE_SHARED)
found = dv.cluster.default_resolver()
told = (found.worker_id, found.num_workers, found.local_rank, found.num_local_workers)
assert told == (world.rank, world.size, here.rank, here.size), told
print(world.allreduce(world.rank))
"""


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_get_rank_and_size_of_mpi(launch, num_workers):
    status, out, err = launch(PLACE, "-n", str(num_workers))
    assert status == 0, err
    total = num_workers * (num_workers - 1) // 2
    assert sorted(out.splitlines()) == [f"[{rank}] {total}" for rank in range(num_workers)]


SHARE = """
import dvkernels as dv
print(*sorted(os.sched_getaffinity(0)), "usable", len(dv.list_devices("cpu")))
"""


@pytest.mark.skipif(CORES < 2, reason="one core cannot be shared out")
def test_each_worker_has_cores_of_its_own(launch):
    every = sorted(os.sched_getaffinity(0))
    status, out, err = launch(SHARE, "-n", str(CORES))
    assert status == 0, err
    bound = sorted(line.split("] ")[1] for line in out.splitlines())
    assert bound == sorted(f"{core} usable 1" for core in every)
    status, out, err = launch(SHARE, "-n", "2", "--no-bind")
    assert status == 0, err
    shared = f"{' '.join(map(str, every))} usable {CORES // 2}"
    assert sorted(out.splitlines()) == [f"[0] {shared}", f"[1] {shared}"]


def test_info_shows_host_and_rank_of_each_worker(engine, flavour):
    command = [
        sys.executable, "-m", "dvkernels", "launch", "--engine", engine, "-n", "2",
        "-m", "dvkernels", "info",
    ]  # fmt: skip
    ran = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = sorted(ran.stdout.splitlines())
    for rank, line in enumerate(lines):
        assert re.fullmatch(
            rf"\[{rank}\] worker {rank} of 2, {rank} of 2 on {re.escape(platform.node())}, cores? "
            r"[0-9,-]+ \((Open MPI|Hydra|/dev/shm/.*)\): cpu:0( cpu:[0-9]+)* PASS",
            line,
        )
    assert len(lines) == 2


@pytest.mark.parametrize(("num_workers", "num_local"), [(4, 1), (2, 2)])
def test_digits_on_several_workers_are_those_of_one_device(
    engine, flavour, tmp_path, num_workers, num_local
):
    for package in ("sklearn", "rich", "threadpoolctl"):
        pytest.importorskip(package)
    command = [
        sys.executable, "-m", "dvkernels", "launch", "--engine", engine,
        "-n", str(num_workers), "--no-prefix", "-m", "dvkernels", "train",
        "--replicas", str(num_local), "--dtype", "float64",
        "--hidden", "64", "--batch-size", "149", "--checkpoint-dir", str(tmp_path), "--resume",
    ]  # fmt: skip
    reports = []
    for _ in range(2):  # the second job resumes after the last step
        ran = subprocess.run(
            [*command, "--epochs", "5", "--json"],
            env={**os.environ, "PYTHONPATH": SEARCH_PATH},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        reports += [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    first, second = reports  # only the chief reports
    assert (first["num_workers"], first["num_replicas"]) == (num_workers, 4)
    assert first["relative_difference_to_one_device"] <= 1e-9
    assert first["test_accuracy"] > 0.9
    assert second["resumed_at_step"] == first["steps"]
    assert second["weights_sha256"] == first["weights_sha256"]


PREEMPTED = """
from dvkernels.cli import main
sys.exit(main.main(["train", "--replicas", "1", "--epochs", "1000", "--hidden", "512",
                    "--checkpoint-dir", "saved", "--checkpoint-every", "5"]))
"""


def test_workers_that_are_told_to_stop_save_the_same_step(flavour, start, tmp_path):
    for package in ("sklearn", "rich", "threadpoolctl"):
        pytest.importorskip(package)
    process = start(PREEMPTED, "-n", "2")
    saved = tmp_path / "saved"
    deadline = time.monotonic() + 60
    while not any(saved.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 42, err
    held = sorted(path.name for path in saved.iterdir())
    assert 1 <= len(held) <= 5, "no partial checkpoint is left, and no more than max_to_keep"
    assert all(name.startswith("step-") for name in held), held
    assert dv.Checkpoint().restore(saved / held[-1], partial=True).unexpected == (
        "weights", "optimizer", "batches", "progress",
    )  # fmt: skip


@pytest.mark.parametrize("hosts", ["2", "1,1"])
def test_workers_calibrate_their_link(engine, flavour, tmp_path, hosts):
    if engine == "local" and hosts != "2":
        pytest.skip("without MPI there is one host")
    hosts = "" if engine == "local" else hosts
    command = [
        sys.executable, "-m", "dvkernels", "launch", "--engine", engine, "-n", "2", "--no-prefix",
        "-m", "dvkernels", "bench", "--calibrate", "--rounds", "1", "--json", "found.json",
    ]  # fmt: skip
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SEARCH_PATH, "DVKERNELS_HOSTS": hosts},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["num_workers"], found["num_hosts"]) == (2, len(hosts.split(",")))
    assert found["latency_seconds"] > 0
    assert all(seconds > 0 for each in found["seconds"].values() for seconds in each)
    over = "in shared memory" if "," not in hosts else "by messages of 2 hosts"
    assert f"2 workers {over}" in ran.stdout


IN_A_BARRIER = (
    "from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1:\n    {}\nMPI.COMM_WORLD.Barrier()"
)
BEFORE_MPI = (
    "import dvkernels as dv\nif dv.cluster.default_resolver().worker_id == 1:\n    {}\n"
    "from mpi4py import MPI\nMPI.COMM_WORLD.Barrier()"
)


@pytest.mark.parametrize("where", [IN_A_BARRIER, BEFORE_MPI], ids=["in a barrier", "before MPI"])
@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("raise ValueError('this one')", 1, "[1] ValueError: this one"),
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", None, ""),
    ],
)
def test_a_worker_that_fails_ends_the_job(flavour, launch, where, end, status, words):
    if (flavour, where, status) == ("Intel MPI", BEFORE_MPI, None):
        pytest.skip("Intel MPI does not notice that a worker was killed before it started MPI")
    started = time.monotonic()
    found, _, err = launch(where.format(end), "-n", "3")
    assert found == status if status else found not in (0, 124), err
    assert f"{flavour} ended with status {found}" in err
    assert words in err
    assert "runpy" not in err
    assert time.monotonic() - started < 60


ALL_LEAVE = """
from mpi4py import MPI
time.sleep(2 * (MPI.COMM_WORLD.rank == 1))
open(str(MPI.COMM_WORLD.rank), "w").close()
sys.exit(42)
"""


def test_workers_that_all_exit_with_a_status(engine, launch, tmp_path):
    text = ALL_LEAVE.replace("2 *", "0.3 *") if engine == "local" else ALL_LEAVE
    status, _, err = launch(text, "-n", "2")
    assert status == 42, err
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


WAITING = """
from mpi4py import MPI

def leave(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGUSR1, lambda number, frame: print("got SIGUSR1", flush=True))
MPI.COMM_WORLD.Barrier()
print("up", os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


def read_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    return sorted(process.stdout.readline() for _ in range(count))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_workers_may_exit_in_order_on_a_signal(start, sent):
    process = start(WAITING, "-n", "2")
    assert [line[:6] for line in read_lines(process, 2)] == ["[0] up", "[1] up"]
    process.send_signal(signal.SIGUSR1)
    assert read_lines(process, 2) == ["[0] got SIGUSR1\n", "[1] got SIGUSR1\n"]
    process.send_signal(sent)
    out, err = process.communicate(timeout=SECONDS)
    said = sorted(line for line in out.splitlines() if "got" in line)  # launchers add lines
    assert said == [f"[0] got {sent.name}", f"[1] got {sent.name}"]
    assert process.returncode == 0, err


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


@pytest.mark.parametrize("ignoring", [True, False], ids=["ignoring SIGTERM", "leaving"])
def test_no_process_is_left_when_the_launcher_itself_is_killed(start, ignoring):
    text = WAITING.replace("SIGTERM, leave", "SIGTERM, signal.SIG_IGN") if ignoring else WAITING
    process = start(text, "-n", "2")
    workers = [int(line.split()[-1]) for line in read_lines(process, 2)]
    below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert set(workers) < set(below)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert all_gone(below)


VANISHES = """
import re
import numpy as np
import dvkernels as dv
strategy = dv.MultiWorkerMirroredStrategy(devices=["cpu:0"], timeout_seconds=20)
strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.ones(9)))
with open("/proc/self/maps") as maps, open("held", "a") as held:
    print(*re.findall("/dev/shm/[^ ]+(?=\\n)", maps.read()), file=held)
if dv.cluster.default_resolver().worker_id == 1:
    END
strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.ones(9)))
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "raise ValueError"])
def test_a_job_that_lost_a_worker_fails_and_leaves_nothing(engine, launch, tmp_path, end):
    status, _, err = launch(VANISHES.replace("END", end), "-n", "2", "--grace", "3")
    assert status not in (0, 124), err
    held = (tmp_path / "held").read_text().split()
    assert held or engine == "local"  # whose file has no name any more
    assert [name for name in held if Path(name).exists()] == []


def test_an_input_that_nobody_reads_and_one_that_is_read(start):
    text = "x" * 3_000_000
    for program, words in (("", ()), ("print(len(sys.stdin.read()))", ("[0] 3000000", "[1] 0"))):
        process = start(program, "-n", "2", stdin=subprocess.PIPE)
        out, err = process.communicate(text, timeout=SECONDS)
        assert process.returncode == 0, err
        assert sorted(out.splitlines()) == list(words)


def test_two_hosts(flavour, launch):
    if flavour != "MPICH":
        pytest.skip("needs a launcher that starts processes on other hosts without a shell there")
    options = ("--launcher-option=-launcher", "--launcher-option=fork")
    text = PLACE.replace("here.rank, here.size", "*divmod(world.rank, 2)[1:], 2")
    status, out, err = launch(text, "--hosts", "localhost:2,127.0.0.1:2", *options)
    assert status == 0, err
    assert sorted(out.splitlines()) == [f"[{rank}] 6" for rank in range(4)]


DATA_THAT_DIFFER = """
import numpy as np
import dvkernels as dv

strategy = dv.MultiWorkerMirroredStrategy(devices=["cpu:0"], timeout_seconds=60)
odd = strategy.cluster_resolver.worker_id
rows = np.arange(12)[:: -1 if odd else 1]
for name, data in {
    "alike": dv.Dataset.range(12),
    "seeds": dv.Dataset.range(12).shuffle(seed=odd),
    "lengths": dv.Dataset.range(12 - odd),
    "orders": dv.Dataset.from_sequence(list(rows)),
}.items():
    options = dv.InputOptions(fingerprint=name == "orders")
    batches = iter(strategy.distribute_dataset(data.batch(4), options))
    try:
        seen = [int(x) for batch in batches for x in strategy.gather(batch)]
        print(name, sorted(seen) == list(range(12)), flush=True)
    except dv.errors.DatasetError as error:
        print(name, error, flush=True)
distributed = strategy.distribute_dataset(dv.Dataset.range(12).shuffle(seed=1).batch(4))
if odd:
    next(iter(distributed))  # a step that the other worker does not take
try:
    for batch in distributed:
        strategy.gather(batch)
except dv.errors.CollectiveMismatchError as error:
    print("looks", "next(iterator) of a distributed dataset" in str(error), flush=True)
"""


def test_workers_whose_data_differ_raise_an_error(launch):
    _, out, err = launch(DATA_THAT_DIFFER, "-n", "2")
    for worker in "01":
        said = re.findall(rf"^\[{worker}\] (.*)$", out, re.M)
        words = dict(line.split(" ", 1) for line in said)
        assert words["alike"] == words["looks"] == "True", out + err
        assert "shuffle(seed=0) on worker 0, shuffle(seed=1) on worker 1" in words["seeds"]
        assert "range(12) on worker 0, range(11) on worker 1" in words["lengths"]
        assert "fingerprint" in words["orders"]
