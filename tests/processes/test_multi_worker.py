"""The same program on several processes: laws of strategies, variables, training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mpi_jobs import Job, needs_mpi, run
from worker_programs import go_on, trained

import dvkernels as dv

pytestmark = needs_mpi
# Each transport daily; more numbers of workers in slow campaigns.
DAILY = [
    (1, 2, "memory"), (2, 2, "memory"), (4, 1, "memory"),
    (2, 2, "1,1"), (4, 1, "2,2"), (3, 1, "2,1"),
]  # fmt: skip
SLOW = [(2, 1, "memory"), (2, 1, "1,1"), (3, 1, "1,1,1"), (4, 1, "3,1")]
SHAPES = pytest.mark.parametrize(
    ("count", "num_local", "over"),
    [*DAILY, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SLOW)],
)


@SHAPES
def test_the_laws_of_communicators(count, num_local, over):
    run(count, "communicator_laws", num_local, over)


@pytest.mark.parametrize("ops", ["direct", "ring"])
@pytest.mark.parametrize(
    ("count", "num_local", "over"),
    [
        (4, 1, "2,1,1"),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [
                (2, 1, "1,1"),
                (2, 2, "1,1"),
                (3, 1, "1,1,1"),
                (4, 1, "3,1"),
                (4, 1, "2,2"),
            ]
        ),
    ],
)
def test_the_laws_of_each_algorithm_between_hosts(count, num_local, over, ops):
    run(count, "communicator_laws", num_local, over, ops)


@pytest.mark.parametrize("over", ["memory", "1,1"])
def test_algorithms_or_networks_that_differ_are_an_error_on_all(over):
    outcome = Job(2, "mismatched_algorithms", over).wait(60)
    assert outcome.code != 0  # the group was aborted, and with it the job
    assert "Traceback" not in outcome.written, outcome.written


def test_large_arrays_around_a_ring():
    run(3, "large", "1,1,1", 150_000_001, "ring")


@pytest.mark.parametrize(
    ("count", "num_local", "over"), [(2, 1, "memory"), (3, 2, "memory"), (3, 1, "2,1")]
)
def test_arrays_in_shared_memory(count, num_local, over):
    run(count, "own_memory", num_local, over)


@pytest.mark.parametrize("over", ["memory", "1,1"])
@pytest.mark.parametrize(
    "num_bytes", [150_000_001, pytest.param(2**31 + 5, marks=pytest.mark.slow)]
)
def test_large_arrays(over, num_bytes):
    run(2, "large", over, num_bytes)


def test_drift_between_workers_is_found():
    run(2, "drift", "memory")


@SHAPES
def test_the_laws_of_strategies(count, num_local, over):
    run(count, "strategy_laws", num_local, over)


@SHAPES
def test_variables(count, num_local, over):
    run(count, "variables", num_local, over)


@pytest.mark.parametrize(
    ("count", "num_local", "over"),
    [
        *((count, 1, "memory") for count in (1, 2, 3, 4)),
        *((2, 2, over) for over in ("memory", "1,1")),
        *((4, 1, over) for over in ("1,1,1,1", "2,1,1")),
    ],
)
def test_training_is_that_of_one_device(count, num_local, over, tmp_path):
    trains_as_one_device(run, count, num_local, over, tmp_path)


def trains_as_one_device(run, count, num_local, over, tmp_path):
    ops = "ring" if "," in over else "auto"
    run(count, "train", num_local, over, tmp_path / "weights.npz", ops)
    expected, seen = trained(dv.OneDeviceStrategy("cpu:0"))
    found = np.load(tmp_path / "weights.npz")
    assert found["seen"].tolist() == seen
    # 53 elements in batches of 10: the last leaves some replica without any.
    epochs = [seen[start : start + 53] for start in range(0, len(seen), 53)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(53)]] * 3
    for name, right in expected.items():
        difference = np.linalg.norm(found[name] - right) / np.linalg.norm(right)
        assert difference <= 1e-9, name


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_checkpoint_resumes_on_another_number_of_workers(is_apart, tmp_path):
    resumes_on_other_numbers(run, is_apart, tmp_path)


def resumes_on_other_numbers(run, is_apart, tmp_path):
    go_on("1", "alone", str(tmp_path / "whole"), "25")
    for count, num_local, until in ((2, 1, 6), (3, 1, 13), (1, 2, 18), (2, 2, 25)):
        over = ",".join(["1"] * count) if is_apart else "memory"
        run(count, "go_on", num_local, over, tmp_path, until)
        # The background save before last was finished by the last one, which exit finished.
        assert (tmp_path / f"step-{until:08d}" / "manifest.json").exists()
        shards = list((tmp_path / f"step-{until:08d}").glob("shard-*"))
        assert len(shards) == count
    expected = np.load(tmp_path / "whole" / "found.npy")
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "num_local", "over"), [(4, 1, "memory"), (2, 2, "memory"), (4, 1, "2,2")]
)
def test_random_draws_are_those_of_one_process(count, num_local, over, tmp_path):
    run(count, "random_draws", num_local, over, tmp_path)
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    run(1, "random_draws", 4, "memory", tmp_path)
    assert drawn == json.loads((tmp_path / "drawn.json").read_text())
    assert drawn["rows"][:4] == drawn["rows"][4:]
    assert drawn["own"][1:4] == drawn["own"][4:7]  # the second strategy begins with step 1
    assert len({number for step in drawn["own"][:4] for number in step}) == 4 * 4


@pytest.mark.parametrize("program", ["strategy_laws", "variables"])
@pytest.mark.parametrize(("num_local", "over"), [(1, "memory"), (2, "memory"), (1, "1,1")])
def test_replicas_on_gpus(program, num_local, over):
    run(2, program, num_local, over, environ={"NUMBA_ENABLE_CUDASIM": "1"})


def test_an_mpi_with_broken_persistent_requests():
    run(2, "broken_persistent_requests", "as they are")
