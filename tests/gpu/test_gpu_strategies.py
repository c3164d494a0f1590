"""Strategies on a real GPU: ``pytest -m gpu``; between several ``pytest -m multi_gpu``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.communicators.nccl.communicator import Nccl
from dvkernels.devices import cuda
from dvkernels.testing import check_strategy

ROOT = Path(__file__).resolve().parents[2]
num_gpus = 0 if cuda.is_simulated() or cuda.missing() else len(cuda.devices())
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_gpus < 1, reason=cuda.missing() or "it is the simulator"),
]
multi_gpu = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(num_gpus < 2, reason="needs two GPUs"),
]
needs_gpu = lambda test: gpu[0](gpu[1](test))  # noqa: E731
needs_gpus = lambda test: multi_gpu[0](multi_gpu[1](test))  # noqa: E731


@needs_gpus
@pytest.mark.parametrize("ops", ["auto", "nccl"])
def test_the_laws_between_gpus(ops):
    names = [f"cuda:{k}" for k in range(num_gpus)]
    check_strategy(
        lambda n: dv.MirroredStrategy(names[:n], cross_device_ops=ops), range(1, num_gpus + 1)
    )


@needs_gpus
def test_nccl_reduces():
    import cupy

    nccl = Nccl([dv.Device("cuda", k) for k in range(2)])
    values = []
    for device in range(2):
        with cupy.cuda.Device(device):
            values.append(cupy.full((5, 3), device + 1.0, "f4"))
    for result in nccl.all_reduce(values, dv.ReduceOp.MEAN):
        assert (result.get() == 1.5).all()
    for part, length in zip(nccl.reduce_scatter(values, dv.ReduceOp.SUM), (3, 2), strict=True):
        assert part.get().tolist() == [[3.0] * 3] * length


NCCL_WORKER = """
import cupy, numpy as np, dvkernels as dv
from dvkernels.communicators.nccl.communicator import Nccl

worker = dv.cluster.default_resolver()
strategy = dv.MultiWorkerMirroredStrategy(
    devices=[f"cuda:{worker.local_rank}"], cross_device_ops="nccl", timeout_seconds=60
)
given = []
call = Nccl.all_reduce
Nccl.all_reduce = lambda self, *args: given.append(call(self, *args)) or given[-1]

def step():
    replica = dv.get_replica_context()
    k = replica.replica_id_in_sync_group
    later = replica.all_reduce_async("sum", cupy.full(5, k + 1.0))
    half = replica.all_reduce("sum", cupy.full(3, k + 1, "f2"))
    total = replica.all_reduce("mean", cupy.full((1000, 3), k + 1.0, "f4"))
    rows = replica.all_gather(cupy.full((k + 1, 2), k))
    part = replica.reduce_scatter("sum", cupy.arange(5.0))
    return [one.get().tolist() for one in (later.wait(), half, total[0], rows, part)]

with strategy:
    found = strategy.local_results(strategy.run(step))[0]
    assert found[:4] == [[3.0] * 5, [3.0] * 3, [1.5] * 3, [[0, 0], [1, 1], [1, 1]]], found
    assert found[4] == ([0.0, 2.0, 4.0], [6.0, 8.0])[worker.worker_id]
    assert given
"""


@needs_gpus
def test_nccl_between_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(NCCL_WORKER)
    ended = subprocess.run(
        [sys.executable, "-m", "dvkernels", "launch", "-n", "2", str(script)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]


@needs_gpu
def test_two_replicas_of_one_gpu_learn_the_digits():
    ended = subprocess.run(
        [sys.executable, "-m", "dvkernels", "train", "--device", "cuda", "--replicas", "2",
         "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    report = __import__("json").loads(ended.stdout)
    assert report["test_accuracy"] > 0.95
    assert report["relative_difference_to_one_device"] < 1e-3


@needs_gpu
def test_each_replica_has_a_stream_and_streams_are_ordered():
    import cupy

    with dv.MirroredStrategy(["cuda:0"] * 4) as strategy:
        with strategy.scope():
            total = dv.Variable(np.zeros(1 << 20, "f4"), aggregation="sum")
        ones = cupy.ones(1 << 20, "f4")

        def step():
            own = ones
            for _ in range(50):  # slow work, on this replica's stream
                own = own * 1
            total.assign_add(own)
            return cupy.cuda.get_current_stream().ptr

        for turn in range(1, 20):
            ones = ones + 0  # made on the caller's stream, right before
            streams = strategy.run(step)
            assert len({*streams.values}) == 4
            doubled = total.read_value() * 1  # on the caller's stream, right after
            assert (doubled == 4 * turn).all()


@needs_gpu
def test_memory_goes_back_to_the_pool():
    import cupy

    pool = cupy.get_default_memory_pool()

    def steps():
        with dv.MirroredStrategy(["cuda:0"] * 2) as strategy:
            with strategy.scope():
                weight = dv.Variable(np.zeros(1 << 18, "f4"), aggregation="mean")
            for _ in range(10):
                strategy.run(lambda: weight.assign_add(cupy.ones(1 << 18, "f4")))

    steps()
    before = pool.used_bytes()
    for _ in range(5):
        steps()
    assert pool.used_bytes() <= before


@needs_gpu
def test_batches_arrive_whole_while_steps_compute():
    import cupy

    rows = np.arange(1 << 22, dtype="f4").reshape(-1, 1 << 10)
    with dv.MirroredStrategy(["cuda:0"] * 2) as strategy:
        sums = []
        for batch in strategy.distribute_dataset(dv.Dataset.from_arrays(rows).batch(64)):
            sums.append(strategy.run(lambda part: (part * cupy.float32(1)).sum(axis=1), (batch,)))
    found = np.concatenate([part.get() for one in sums for part in one.values])
    np.testing.assert_allclose(found, rows.sum(axis=1), rtol=1e-5)


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import cupy\nfrom dvkernels import kernels\n"
        "for n in (1, 7, 1000, 100003):\n"
        "    a = [cupy.ones(n, 'f4'), cupy.ones(n, 'f4')]\n"
        "    kernels.all_reduce(a); kernels.all_gather(a); kernels.reduce_scatter(a)\n"
        "cupy.cuda.Device().synchronize()\n"
    )
    ended = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "CUPY_ACCELERATORS": ""}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]


@needs_gpu
def test_items_are_mapped_on_the_streams_of_the_replicas():
    import cupy

    with dv.MirroredStrategy(["cuda:0", "cuda:0"]) as strategy:
        given = cupy.arange(1_000_000, dtype="f8")

        def work(k):
            assert cupy.cuda.get_current_stream().ptr
            result = given
            for _ in range(5):  # temporary arrays, whose memory is used again
                result = result + k
            return result

        totals = [result.sum() for result in strategy.map(work, range(100))]
        first = float(given.sum())
        assert [float(total) for total in totals] == [first + 5e6 * k for k in range(100)]
