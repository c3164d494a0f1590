"""Strategies on simulated GPUs, beyond the tests that they share with CPU devices."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import dvkernels as dv
from dvkernels import errors
from dvkernels.benchmarks import gpu
from dvkernels.cli.main import main
from dvkernels.devices import array_memory

pytestmark = pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM") != "1", reason="needs the simulator"
)


@pytest.fixture
def two():
    with dv.MirroredStrategy(["cuda:0", "cuda:0"]) as strategy:
        yield strategy


def on_gpu(value):
    return array_memory.gpu().new(np.asarray(value), dv.Device("cuda", 0))


def here():
    return dv.get_replica_context()


def rank():
    return here().replica_id_in_sync_group


def test_strategies_use_gpus_by_default():
    with dv.MirroredStrategy() as strategy:
        assert [str(device) for device in strategy.worker_devices] == ["cuda:0"]
    with dv.CentralStorageStrategy(["cuda:0"] * 2) as strategy:
        assert [str(device) for device in strategy.parameter_devices] == ["cuda:0"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dv.MirroredStrategy(["cpu:0", "cuda:0"]),
        lambda: dv.CentralStorageStrategy(["cuda:0"], "cpu:0"),
    ],
)
def test_a_strategy_refuses_mixed_kinds_of_memory(make):
    with pytest.raises(errors.DeviceError, match="one kind of memory"):
        make()


def test_a_variable_lies_on_its_devices_and_is_copied_to_the_host_on_request(two):
    with two.scope():
        weight = dv.Variable(np.arange(3.0))
    read = weight.read_value()
    assert type(read) is type(on_gpu(0.0))
    assert type(weight.numpy()) is np.ndarray
    weight.numpy()[:] = 7  # a copy
    assert np.asarray(weight).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        read[...] = 7.0
    assert weight.copy_to("cpu:0").on(1).tolist() == [0, 1, 2]
    assert type(weight.copy_to("cpu:0").on(0)) is np.ndarray
    assert "float64[3]" in repr(two.run(weight.read_value))


def test_assigned_host_values_move_to_the_gpu_and_reduced_ones_stay(two):
    with two.scope():
        weight = dv.Variable(np.zeros(2), aggregation="mean")
    two.run(lambda: weight.assign(np.full(2, rank() + 1.0)))
    assert weight.numpy().tolist() == [1.5, 1.5]
    found = two.run(lambda: (here().all_reduce("sum", np.ones(2)), here().all_reduce("sum", 1.0)))
    assert type(found[0][0]) is np.ndarray
    assert found[1][1] == 2.0
    with pytest.raises(errors.BufferMismatchError, match="one kind of device"):
        two.run(lambda: here().all_reduce("sum", on_gpu(np.ones(2)) if rank() else np.ones(2)))


def in_some_memory(at):
    return on_gpu(np.ones(2)) if rank() == at else np.ones(2)


MIXED = {
    "all_reduce": lambda at: here().all_reduce("sum", in_some_memory(at)),
    "async": lambda at: here().all_reduce_async("sum", in_some_memory(at)).wait(),
    "shared": lambda at: here().all_reduce("sum", in_some_memory(at), shared=True),
    "weighted": lambda at: here().all_reduce("mean", in_some_memory(at), weight=1.0),
    "out": lambda at: here().all_reduce("sum", np.ones(2), out=on_gpu(np.ones(2))),
    "out of one": lambda at: here().all_reduce("sum", np.ones(2), out=in_some_memory(at)),
    "several": lambda at: here().all_reduce("sum", [in_some_memory(at), np.ones(3)]),
    "reduce_scatter": lambda at: here().reduce_scatter("sum", in_some_memory(at)),
    "all_gather": lambda at: here().all_gather(in_some_memory(at)),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("bytes_per_bucket", [None, 1 << 20])
def test_arrays_in_several_kinds_of_memory_are_refused(at, bytes_per_bucket):
    with dv.MirroredStrategy(["cuda:0", "cuda:0"], bytes_per_bucket=bytes_per_bucket) as strategy:
        for call in MIXED.values():
            with pytest.raises(errors.BufferMismatchError, match="one kind of device"):
                strategy.run(lambda call=call: call(at))
        mixed = strategy.run(lambda: in_some_memory(at))
        with pytest.raises(errors.BufferMismatchError, match="one kind of device"):
            strategy.reduce("sum", mixed)
        with pytest.raises(errors.BufferMismatchError, match="one kind of device"):
            strategy.gather(mixed)


def test_a_cpu_strategy_refuses_arrays_of_a_gpu():
    with dv.MirroredStrategy(["cpu:0"]) as strategy:
        with pytest.raises(errors.BufferMismatchError, match="host"):
            strategy.run(lambda: here().all_reduce("sum", on_gpu(np.ones(2))))
        with strategy.scope(), pytest.raises(errors.BufferMismatchError, match="host"):
            dv.Variable(on_gpu(np.ones(2)))


def test_arrays_of_numba_are_accepted(two):
    from numba import cuda

    held = cuda.to_device(np.ones(3))
    total = two.run(lambda: here().all_reduce("sum", held))[0]
    assert array_memory.gpu().to_host(total).tolist() == [2, 2, 2]
    into = cuda.to_device(np.zeros(3))
    two.run(lambda: here().all_reduce("sum", held, out=into) if rank() == 0 else
            here().all_reduce("sum", held, out=cuda.to_device(np.zeros(3))))  # fmt: skip
    assert into.copy_to_host().tolist() == [2, 2, 2]


def test_arrays_of_gpu_and_host_do_not_mix_implicitly(two):
    with two.scope():
        weight = dv.Variable(np.ones(2))
    with pytest.raises(TypeError, match="copy the latter"):
        two.run(lambda: weight.read_value() + np.ones(2))
    with pytest.raises(TypeError, match=r"get\(\)"):
        np.asarray(weight.read_value())


def test_a_checkpoint_moves_between_gpu_and_cpu(two, tmp_path):
    def made(strategy):
        with strategy.scope():
            weight = dv.Variable(np.zeros(4), aggregation="mean", name="weight")
            seen = dv.Variable(0, synchronization="on_read", aggregation="sum", name="seen")
            own = dv.Variable(np.zeros(2), synchronization="none", name="own")
        adam = dv.optimizers.Adam(0.1)
        return weight, seen, own, adam, dv.Checkpoint(weight=weight, seen=seen, own=own, adam=adam)

    def step(weight, seen, own, adam):
        adam.apply_gradients([(np.arange(4.0) + rank(), weight)])
        seen.assign_add(rank() + 1)
        own.assign(np.full(2, float(rank())))

    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as cpus:
        on_gpus, on_cpus = made(two), made(cpus)
        two.run(step, on_gpus[:4])
        cpus.run(step, on_cpus[:4])
        expected = on_cpus[0].numpy()
        np.testing.assert_allclose(on_gpus[0].numpy(), expected, rtol=1e-15)
        on_gpus[4].save(tmp_path / "gpu")
        for strategy in (two, cpus):
            weight, seen, own, adam, checkpoint = made(strategy)
            checkpoint.restore(tmp_path / "gpu")
            np.testing.assert_array_equal(weight.numpy(), on_gpus[0].numpy())
            assert int(seen) == 3
            assert [float(copy[0]) for copy in own.values] == [0.0, 1.0]
            strategy.run(step, (weight, seen, own, adam))
            assert adam.iterations == 2
            assert int(seen) == 6
        on_cpus[4].save(tmp_path / "cpu")
        on_gpus[4].restore(tmp_path / "cpu")
        np.testing.assert_array_equal(on_gpus[0].numpy(), expected)


def test_debug_mode_checks_arrays_on_gpus(two):
    with two.scope():
        weight = dv.Variable(np.ones(2), aggregation="sum")
    with dv.debug():
        with pytest.raises(errors.NonFiniteError, match="1 NaN"):
            weight.assign(np.array([1.0, np.nan]))
        with pytest.raises(errors.DriftError, match="replica 1 differs"):
            two.update(
                weight, lambda copy: copy.assign_add(np.full(2, float("replica_1" in copy.name)))
            )
    assert weight.numpy().tolist() == [1, 1]


def test_values_are_copied_between_kinds_of_devices(two):
    value = two.run(lambda: on_gpu(np.full(2, float(rank()))))
    assert two.reduce_to("sum", value, "cpu:0").on(0).tolist() == [1, 1]
    assert type(two.broadcast_to(np.ones(2), "cuda:0").on(0)) is type(on_gpu(0.0))
    assert value.copy_to("cpu:0").on(1).tolist() == [1, 1]


def test_gradients_are_clipped_on_their_gpu():
    found, norm = dv.optimizers.clip_by_global_norm([on_gpu([3.0, 0.0]), on_gpu([4.0])], 1.0)
    assert norm == 5.0
    assert [np.round(one.get(), 12).tolist() for one in found] == [[0.6, 0.0], [0.8]]


def test_batches_are_copied_to_the_devices_of_their_replicas(two):
    data = dv.Dataset.from_arrays((np.arange(10.0), np.arange(10))).batch(4)
    for prefetch in (None, 2):
        seen = []
        options = dv.InputOptions(prefetch=prefetch)
        for rows, labels in two.distribute_dataset(data, options):
            assert type(rows[0]) is type(labels[1]) is type(on_gpu(0.0))
            assert str(rows.devices[0]) == "cuda:0"
            seen += [one for part in rows.values for one in part.tolist()]
        assert seen == [*range(10)]
    on_host = next(iter(two.distribute_dataset(data, dv.InputOptions(prefetch_to_device=False))))
    assert type(on_host[0][0]) is np.ndarray


def test_an_iterator_over_gpus_resumes_on_the_cpu(two):
    data = dv.Dataset.range(10).shuffle(seed=3).batch(4)
    batches = iter(two.distribute_dataset(data))
    first = next(batches)
    with dv.MirroredStrategy(["cpu:0"]) as one:
        others = iter(one.distribute_dataset(data))
        others.load_state_dict(batches.state_dict())
        rest = [int(k) for part in others for k in part[0]]
    assert sorted([int(k) for part in first.values for k in part.tolist()] + rest) == [*range(10)]


def test_training_on_gpus_matches_one_gpu(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    arguments = [
        "train",
        "--device",
        "cuda",
        "--replicas",
        "2",
        "--epochs",
        "1",
        "--hidden",
        "16",
        "--batch-size",
        "512",
        "--json",
    ]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_replicas"] == 2
    assert report["relative_difference_to_one_device"] < 1e-5
    assert report["test_accuracy"] > 0.3


def test_bench_writes_the_report_of_a_gpu(tmp_path, capsys):
    assert main(["bench", "--device", "cuda", "--report", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert "simulator" in report["about"]["Machine"]
    graph = next(one for one in report["figures"] if "graph" in one["name"])
    assert graph["seconds"] is None
    assert "not measured" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == capsys.readouterr().out


def test_a_wrong_result_is_not_reported(monkeypatch):
    monkeypatch.setattr(gpu.kernels, "all_reduce", lambda *_: None)
    with pytest.raises(errors.DeviceError, match="nothing is reported"):
        gpu.measure(
            plan=gpu.MeasurementPlan(nbytes=64, small_nbytes=16, rounds=1, calls=1, small_calls=1)
        )


def test_measured_shares_of_batches_on_gpus(two):
    """One step of seven is measured, in which the host waits for the streams."""
    data = dv.Dataset.from_arrays(np.arange(900.0, dtype=np.float32)).batch(6)

    def step(rows):
        worked = np.zeros(20_000 if rank() else 100)  # shapes of parts do not matter
        for _ in range(40):
            worked += 1
        return here().all_reduce("mean", rows.sum() / len(rows), weight=len(rows))

    counts, means = [], []
    with iter(two.distribute_dataset(data, dv.InputOptions(balance="measured"))) as batches:
        for batch in batches:
            counts.append([len(part) for part in batch.values])
            means.append(float(two.run(step, (batch,)).on(0)))
        stats = batches.stats()
    np.testing.assert_allclose(means, np.arange(900.0).reshape(150, 6).mean(1), rtol=1e-6)
    assert {sum(count) for count in counts} == {6}
    assert len(stats.seconds_per_element) == 2


def test_items_are_mapped_to_arrays_on_gpus(two):
    results = two.map(lambda k: on_gpu([k, rank() >= 0]), range(9))
    for k, result in enumerate(results):
        assert array_memory.gpu().to_host(result).tolist() == [k, 1]


def test_a_trace_shows_kernels_and_copies_on_the_lanes_of_streams(two, tmp_path):
    with dv.profiler.trace(tmp_path / "t"):
        two.run(lambda: here().all_reduce("sum", on_gpu(np.ones(8))))
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found = {
        event["cat"]: event for event in events if lanes.get(event["tid"], "").startswith("cuda:0")
        and event["ph"] == "X"
    }  # fmt: skip
    assert found.keys() == {"kernel", "copy"}
    assert found["kernel"]["name"].startswith("dvkernels_")
    assert found["copy"]["args"] == {
        "from": "host",
        "to": "cuda:0",
        "bytes": 64,
        "dtype": "float64",
    }
