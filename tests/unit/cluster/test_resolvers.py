"""Resolvers on the environments that launchers really set, and on malformed ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

import dvkernels as dv
from dvkernels.cluster import (
    ClusterResolver,
    KubernetesClusterResolver,
    MPIClusterResolver,
    SimpleClusterResolver,
    SlurmClusterResolver,
    TFConfigClusterResolver,
    default_resolver,
)
from dvkernels.errors import ClusterError

# Recorded from rank 3 of 4 under Open MPI 5.0.11, MPICH 5.0.2 and Intel MPI 2021.18 (which sets
# the variables of MPICH), on two simulated hosts.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-vm-3794@1",
}
HYDRA = {
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "20",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
}
# From srun's manual and TensorFlow's tests: 9 tasks on 4 nodes; the last task of node m5.
SRUN = {
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2,1",
    "SLURM_NTASKS": "9",
}
# The environment of Hydra's daemon inside an allocation: one task per node.
SRUN_OF_A_DAEMON = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
# In an sbatch script, outside srun.
SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "9", "SLURM_JOB_ID": "1"}
POD = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "digits-2"}


def place(resolver: ClusterResolver) -> tuple[int | None, int, int | None, int | None]:
    return (
        resolver.worker_id,
        resolver.num_workers,
        resolver.local_rank,
        resolver.num_local_workers,
    )


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, {**HYDRA, **SRUN_OF_A_DAEMON}])
def test_mpi(environ):
    resolver = MPIClusterResolver(environ=environ)
    assert place(resolver) == place(default_resolver(environ)) == (3, 4, 1, 2)
    assert (resolver.task_type, resolver.task_id, resolver.is_chief) == ("worker", 3, False)
    assert resolver.cluster_spec() == dv.cluster.ClusterSpec({})


def test_srun_is_an_mpi_launcher_too():
    assert place(MPIClusterResolver(environ=SRUN)) == (7, 9, 1, 2)
    assert place(MPIClusterResolver(environ={**SRUN, "PMI_RANK": "7", "PMI_SIZE": "9"}))[2] == 1


def test_a_process_manager_without_local_ranks():
    environ = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert place(MPIClusterResolver(environ=environ)) == (1, 2, None, None)


def test_slurm():
    resolver = SlurmClusterResolver(environ=SRUN)
    assert place(resolver) == (7, 9, 1, 2)
    assert isinstance(default_resolver(SRUN), SlurmClusterResolver)


def test_the_batch_script_of_an_allocation_is_not_a_worker():
    assert place(default_resolver(SBATCH)) == (0, 1, 0, 1)
    with pytest.raises(ClusterError, match="SLURM_STEP_NUM_TASKS is not set"):
        SlurmClusterResolver(environ=SBATCH)


def config(cluster: Any, **task: Any) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"type": "chief", "index": 0}, (0, 3, 0, 2)),
        ({"type": "worker", "index": 0}, (1, 3, 1, 2)),
        ({"type": "worker", "index": "1"}, (2, 3, 0, 1)),
        ({"type": "ps", "index": 0}, (None, 3, None, None)),
        ({"type": "evaluator", "index": 0}, (None, 3, None, None)),
    ],
)
def test_tf_config(task, expected):
    cluster = {"chief": ["a:1"], "worker": ["a:2", "b:1"], "ps": ["c:1"]}
    resolver = TFConfigClusterResolver(environ=config(cluster, **task))
    assert place(resolver) == place(default_resolver(config(cluster, **task))) == expected
    assert (resolver.task_type, resolver.task_id) == (task["type"], int(task["index"]))
    assert resolver.is_chief == (task["type"] == "chief")
    assert resolver.cluster_spec() == dv.cluster.ClusterSpec(cluster)


def test_tf_config_is_overruled_by_arguments_and_by_our_own_variable():
    environ = config({"worker": ["a:1", "b:1"]}, type="worker", index=0)
    assert TFConfigClusterResolver(task_id=1, environ=environ).worker_id == 1
    own = config({"worker": ["x:1"]}, type="worker", index=0)["TF_CONFIG"]
    resolver = TFConfigClusterResolver(environ={**environ, "DVKERNELS_CLUSTER": own})
    assert resolver.cluster_spec().job_tasks("worker") == ("x:1",)
    assert resolver.source == "DVKERNELS_CLUSTER"


@pytest.mark.parametrize("environ", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": " {} "}])
def test_without_tf_config_there_is_one_worker(environ):
    resolver = TFConfigClusterResolver(environ=environ)
    assert place(resolver) == (0, 1, 0, 1)
    assert resolver.is_chief
    assert resolver.cluster_spec().jobs == ()


def test_kubernetes():
    environ = {**POD, "DVKERNELS_NUM_WORKERS": "4"}
    resolver = KubernetesClusterResolver(environ=environ)
    assert place(resolver) == place(default_resolver(environ)) == (2, 4, 0, 1)
    assert place(KubernetesClusterResolver(3, environ=POD)) == (2, 3, 0, 1)


def test_an_indexed_job_without_a_number_of_workers_has_independent_pods():
    assert place(default_resolver(POD)) == (0, 1, 0, 1)


def test_simple():
    assert place(SimpleClusterResolver({})) == (0, 1, 0, 1)
    assert place(SimpleClusterResolver({"worker": ["a", "b", "a:1"]}, task_id=2)) == (2, 3, 1, 2)
    assert SimpleClusterResolver({"chief": ["a"]}).is_chief


@pytest.mark.parametrize(
    ("resolver", "arguments", "message"),
    [
        (MPIClusterResolver, {"environ": {}}, "none of OMPI_COMM_WORLD_RANK, PMI_RANK, SLURM_PRO"),
        (MPIClusterResolver, {"environ": {"PMIX_RANK": "1"}}, "PMIX_RANK='1' says"),
        (
            MPIClusterResolver,
            {"environ": {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"}},
            "OMPI_COMM_WORLD_RANK: expected an integer from 0 to 3; got '4'",
        ),
        (
            MPIClusterResolver,
            {"environ": {**HYDRA, "MPI_LOCALNRANKS": "x"}},
            "MPI_LOCALNRANKS: expected an integer from 1 to 4; got 'x'",
        ),
        (
            MPIClusterResolver,
            {"environ": {k: v for k, v in HYDRA.items() if k != "PMI_SIZE"}},
            "PMI_SIZE is not set",
        ),
        (
            SlurmClusterResolver,
            {"environ": {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,2"}},
            "SLURM_STEP_TASKS_PER_NODE: '3,2' adds up to 5 tasks, but SLURM_STEP_NUM_TASKS is 9",
        ),
        (
            SlurmClusterResolver,
            {"environ": {**SRUN, "SLURM_LOCALID": "2"}},
            "SLURM_LOCALID: expected an integer from 0 to 1; got '2'",
        ),
        (TFConfigClusterResolver, {"environ": {"TF_CONFIG": "{"}}, "TF_CONFIG: expected JSON"),
        (TFConfigClusterResolver, {"environ": {"TF_CONFIG": "[]"}}, "TF_CONFIG: .* got '\\[\\]'"),
        (
            TFConfigClusterResolver,
            {"environ": {"TF_CONFIG": '{"tasks": {}}'}},
            "with the keys cluster, task",
        ),
        (
            TFConfigClusterResolver,
            {"environ": {"DVKERNELS_CLUSTER": '{"task": 3}'}},
            'DVKERNELS_CLUSTER: expected "task" to be an object; got 3',
        ),
        (
            TFConfigClusterResolver,
            {"environ": config({"worker": ["a", "a"]}, index=0)},
            "TF_CONFIG: each task needs an address of its own",
        ),
        (
            TFConfigClusterResolver,
            {"environ": config({"worker": ["a", "b"]}, index=1.5)},
            'expected the "index" of the task to be an integer; got 1.5',
        ),
        (
            TFConfigClusterResolver,
            {"environ": config({"worker": ["a", "b"]}, index=2)},
            "TF_CONFIG: this process cannot be worker 2 of ClusterSpec",
        ),
        (
            TFConfigClusterResolver,
            {"environ": config({"worker": ["a", "b"]}, type=["worker"], index=1)},
            'TF_CONFIG: expected the "type" of the task to be a string; got',
        ),
        (
            SimpleClusterResolver,
            {"cluster_spec": {"worker": ["a", "b"]}},
            "index of the worker that this process",
        ),
        (SimpleClusterResolver, {"cluster_spec": {"chief": ["a", "b"]}}, "at most one chief"),
        (KubernetesClusterResolver, {"environ": {}}, "JOB_COMPLETION_INDEX is not set"),
        (KubernetesClusterResolver, {"environ": POD}, "DVKERNELS_NUM_WORKERS is not set"),
        (
            KubernetesClusterResolver,
            {"environ": {**POD, "DVKERNELS_NUM_WORKERS": "2"}},
            "JOB_COMPLETION_INDEX: expected an integer from 0 to 1; got '2'",
        ),
        (KubernetesClusterResolver, {"environ": POD, "num_workers": 0}, "num_workers: expected"),
    ],
)
def test_malformed_input_is_named(resolver, arguments, message):
    with pytest.raises(ClusterError, match=message):
        resolver(**arguments)
