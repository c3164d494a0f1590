"""The batch script starts and requeues a job, and the manifests use existing launch options."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dvkernels.cli.main import main
from dvkernels.cluster import default_resolver
from dvkernels.devices import cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "cluster"
FAKE = ROOT / "tests" / "unit" / "launcher" / "fake_mpiexec.py"
PROGRAM = """
import os, sys
names = ("PMI_SIZE", "OMP_NUM_THREADS", "DVKERNELS_ATTEMPT")
print(*(os.environ[name] for name in names), sys.argv[1:])
"""


BATCH_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("up", flush=True)
while len(sys.argv) == 1:
    time.sleep(0.01)
sys.exit(int(sys.argv[1]))
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def batch(tmp_path):
    """Return a function that starts the batch script with a program, in Slurm's environment."""
    started = []

    def batch(text: str, *words: str, state: str = "RUNNING") -> subprocess.Popen[str]:
        run = f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n'
        mpiexec = executable(tmp_path / "mpiexec", run)
        executable(tmp_path / "squeue", f"#!/bin/sh\necho {state}\n")
        executable(tmp_path / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
        (tmp_path / "train.py").write_text(text)
        found = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            [FILES / "slurm.sh", "--launcher", mpiexec, tmp_path / "train.py", *words],
            env={**os.environ, **BATCH_JOB, **found, **path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield batch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the fake launcher needs Linux")


@needs_linux
def test_the_batch_script_starts_all_workers(batch):
    process = batch(PROGRAM, "--epochs", "10")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    expected = [f"[{rank}] 4 8 1 ['--epochs', '10']" for rank in range(4)]
    assert sorted(out.splitlines()) == expected


@needs_linux
def test_the_batch_script_forwards_sigterm_and_requeues_a_job_that_saved(batch):
    process = batch(SAVES)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (42, "scontrol requeue 7\n"), err


@needs_linux
@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        ("42", "RUNNING", ["scontrol requeue 7"]),  # Slurm has signalled only the workers
        ("42", "CANCELLED", []),
        pytest.param("0", "RUNNING", [], marks=pytest.mark.wide),
        pytest.param("2", "RUNNING", [], marks=pytest.mark.wide),
    ],
)
def test_the_batch_script_requeues_only_a_job_that_saved(batch, end, state, words):
    process = batch(SAVES, end, state=state)
    out, err = process.communicate(timeout=60)
    assert process.returncode == int(end), err
    assert out.splitlines()[4:] == words


def documents(name: str) -> dict[str, dict]:
    """Return the objects of a manifest by their kinds."""
    text = (FILES / name).read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


class Pods(NamedTuple):
    """Pods of a manifest: the arguments of launch, and what must fit to them."""

    words: list[str]
    launcher: dict  # the pod with launch
    worker: dict  # a pod with a worker
    num_workers: int
    variables: tuple[str, ...]  # by which the operator names the hosts to launch


def pods_of(name: str) -> Pods:
    found = documents(name)
    if "MPIJob" in found:
        spec = found["MPIJob"]["spec"]
        launcher, worker = (spec["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
        pods = launcher["template"]["spec"], worker["template"]["spec"]
        container = pods[0]["containers"][0]
        assert container["command"] == ["python", "-m", "dvkernels", "launch"]
        count = worker["replicas"] * spec["slotsPerWorker"]
        return Pods(container["args"], *pods, count, ("HYDRA_HOST_FILE",))
    if "TrainJob" in found:
        runtime, job = found["TrainingRuntime"], found["TrainJob"]["spec"]
        assert (job["runtimeRef"]["kind"], job["runtimeRef"]["name"]) == (
            "TrainingRuntime", runtime["metadata"]["name"],
        )  # fmt: skip
        policy, template = runtime["spec"]["mlPolicy"], runtime["spec"]["template"]["spec"]
        jobs = {each["name"]: each["template"] for each in template["replicatedJobs"]}
        label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        assert (policy["numNodes"], jobs["launcher"]["metadata"]["labels"]) == (1, label)
        pods = [jobs[role]["spec"]["template"]["spec"] for role in ("launcher", "node")]
        for pod in pods:  # Trainer fills in the resources of the containers of this name
            assert [each["name"] for each in pod["containers"]] == ["node"]
            pod["containers"] = [
                {**each, "resources": job["trainer"]["resourcesPerNode"]}
                for each in pod["containers"]
            ]
        assert job["trainer"]["command"] == ["python", "-m", "dvkernels", "launch"]
        count = job["trainer"]["numNodes"] * policy["mpi"]["numProcPerNode"]
        variables = ("OMPI_MCA_orte_default_hostfile", "OMPI_MCA_orte_keep_fqdn_hostnames")
        return Pods(job["trainer"]["args"], *pods, count, variables)
    spec = found["Job"]["spec"]
    pod, count = spec["template"]["spec"], spec["completions"]
    assert spec["parallelism"] == count
    assert pod["subdomain"] == found["Service"]["metadata"]["name"]
    environ = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    for index in range(count):
        worker = default_resolver({**environ, "JOB_COMPLETION_INDEX": str(index)})
        assert (worker.worker_id, worker.num_workers) == (index, count)
    script = pod["containers"][0]["args"][0].replace("\\\n", " ")
    (line,) = re.findall(r"-m dvkernels launch (.*)", script)
    hosts = ",".join(f"digits-{index}.digits" for index in range(count))
    return Pods(shlex.split(line.replace('"$hosts"', hosts)), pod, pod, count, ())


@pytest.mark.parametrize(
    "name", ["kubernetes-mpijob.yaml", "kubernetes-trainjob.yaml", "kubernetes-indexed-job.yaml"]
)
def test_the_manifests_fit_to_launch(tmp_path, capsys, monkeypatch, name):
    pods = pods_of(name)
    mpiexec, program = tmp_path / "mpiexec", tmp_path / "train.py"
    is_open_mpi = "OMPI_MCA_orte_default_hostfile" in pods.variables
    version = "mpiexec (Open MPI) 5.0.11" if is_open_mpi else "HYDRA build details:"
    executable(mpiexec, f"#!/bin/sh\necho '{version}'\n")
    program.write_text("")
    assert pods.words[-1] == "/app/train.py"
    for variable in pods.variables:  # from these `auto` learns that this is a job of MPI
        monkeypatch.setenv(variable, "/etc/mpi/hostfile")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["launch", "--dry-run", *pods.words[:-1], str(program)]) == 0
    command = capsys.readouterr().out
    (limit,) = {each["resources"]["limits"]["cpu"] for each in pods.worker["containers"]}
    assert f"OMP_NUM_THREADS={limit}" in command
    assert f" -n {pods.num_workers} " in command
    assert is_open_mpi == ("PRTE_MCA_prte_default_hostfile=/etc/mpi/hostfile" in command)
    (grace,) = re.findall(r"--grace[ =](\d+)", " ".join(pods.words))
    assert int(grace) < pods.launcher["terminationGracePeriodSeconds"]
    for pod in (pods.launcher, pods.worker):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            mounts = {
                mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])
            }
            assert mounts.keys() <= volumes
            assert pod is not pods.worker or mounts["shared-memory"] == "/dev/shm"


def test_the_page_names_what_there_is():
    page = (ROOT / "docs" / "how-to" / "run-under-mpi.md").read_text(encoding="utf-8")
    assert {*re.findall(r"`([\w-]+\.(?:ya?ml|sh))`", page)} == {f.name for f in FILES.iterdir()}
    kinds = {
        (found["kind"], found["apiVersion"])
        for file in FILES.glob("*.yaml")
        for found in documents(file.name).values()
    }
    for kind, version in kinds - {("ConfigMap", "v1"), ("Service", "v1"), ("Job", "batch/v1")}:
        assert f"`{kind}`" in page
        assert f"`{version}`" in page


# A step of one process a socket, on two nodes of two sockets of four cores.
HYBRID = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


@pytest.fixture
def hybrid(monkeypatch):
    """Return a function that makes this process a task of that step, with an affinity."""

    def become(task: int, affinity: set[int]) -> None:
        place = {"SLURM_PROCID": task, "SLURM_NODEID": task // 2, "SLURM_LOCALID": task % 2}
        for name, value in (HYBRID | place).items():
            monkeypatch.setenv(name, str(value))
        # That of this process, and that of slurmstepd, which has started it.
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda pid: affinity if pid == 0 else {*range(8)}, False
        )
        monkeypatch.setattr(cpu, "quota_of_this_process", lambda: math.inf)
        cpu.usable_cores.cache_clear()

    yield become
    monkeypatch.undo()
    cpu.usable_cores.cache_clear()


@pytest.mark.parametrize("is_bound", [True, False])
def test_one_process_a_socket_has_the_threads_of_its_socket(hybrid, capsys, is_bound):
    for task in range(4):
        first = 4 * (task % 2)
        hybrid(task, {*range(first, first + 4)} if is_bound else {*range(8)})
        worker = default_resolver()
        assert (worker.worker_id, worker.num_workers) == (task, 4)
        assert (worker.local_rank, worker.num_local_workers) == (task % 2, 2)
        assert cpu.usable_cores() == 4
    assert main(["info"]) == 0
    cores = "4-7" if is_bound else "0-7"
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"worker 3 of 4, 1 of 2 on \S+, cores {cores} \(srun\): cpu:0 cpu:1 cpu:2 cpu:3 PASS\n",
        said,
    ), said


def test_launch_starts_one_process_a_socket(tmp_path, monkeypatch, capsys):
    srun = executable(tmp_path / "srun", "#!/bin/sh\necho slurm 22.05.8\n")
    page = (ROOT / "docs" / "how-to" / "run-under-mpi.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"(launch --bind .*) train\.py\n", page.replace("\\\n", " "))
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, HYBRID[name])
    words = shlex.split(line.replace("srun", srun, 1))
    assert main([*words, "--dry-run", "-m", "train"]) == 0
    command = capsys.readouterr().out
    for word in ("--ntasks=4", "--cpus-per-task=4", "--cpu-bind=cores", "OMP_NUM_THREADS=4"):
        assert word in command
    assert "--distribution=block:block" in command
