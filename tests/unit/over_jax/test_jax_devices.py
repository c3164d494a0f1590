"""Eager replicas on JAX devices: conformance, collectives, checkpoints, prefetch, refusals."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.devices import array_memory
from dvkernels.errors import (
    AlgorithmError,
    BufferMismatchError,
    ContextError,
    DeviceError,
    UnsupportedDTypeError,
)
from dvkernels.testing import check_communicator, check_strategy

pytestmark = pytest.mark.jax
here = dv.get_replica_context


@pytest.mark.wide
@pytest.mark.parametrize("count", [1, 2, 8])
def test_laws_of_strategies(tpus, x64, count):
    check_strategy(tpus, [count])


class ThroughDevices:
    """Communicator of NumPy arrays, over that of a strategy, whose arrays are JAX's."""

    def __init__(self, strategy, jax):
        self.size, self._inner = strategy.num_replicas_in_sync, strategy.placement.communicator
        self._own = jax.devices("cpu")[: self.size]
        self._put = jax.device_put

    def _placed(self, values):
        return [self._put(value, device) for value, device in zip(values, self._own, strict=True)]

    def all_reduce(self, values, op, out=None):
        results = [*map(np.array, self._inner.all_reduce(self._placed(values), op))]
        for target, result in zip(out or [], results, strict=out is not None):
            target[...] = result
        return results if out is None else [*out]

    def reduce(self, values, op):
        return np.array(self._inner.reduce(self._placed(values), op))

    def reduce_scatter(self, values, op):
        return [*map(np.array, self._inner.reduce_scatter(self._placed(values), op))]

    def all_gather(self, values, axis):
        return [*map(np.array, self._inner.all_gather(self._placed(values), axis))]

    def broadcast(self, values, root):
        return [*map(np.array, self._inner.broadcast(self._placed(values), root))]


@pytest.mark.wide
@pytest.mark.parametrize("count", [1, 2, 8])
def test_laws_of_communicators(tpus, jax, x64, count):
    dtypes = ["float64", "int64"] if x64 else ["float32", "bfloat16", "uint8", "bool", "complex64"]
    check_communicator(lambda size: ThroughDevices(tpus(size), jax), [count], dtypes=dtypes)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_collectives_are_those_of_numpy(tpus, jax, dtype, count):
    strategy, kind = tpus(count), np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    numbers = np.random.default_rng(0).integers(1, 3, (count, 4, 3)).astype(kind)
    ops = ["sum", "prod"] + ["mean"] * (kind.kind not in "iu")
    ops += ["min", "max"] * (kind.kind != "c")

    def step(own):
        return {op: here().all_reduce(op, own) for op in ops} | {
            "gather": here().all_gather(own, axis=1),
            "scatter": here().reduce_scatter("sum", own),
            "root": here().broadcast(own, root=count - 1),
        }

    on_host = strategy.run(step, (dv.PerReplica([*numbers]),))
    on_jax = strategy.run(step, (dv.PerReplica([*map(jax.numpy.asarray, numbers)]),))
    for verb, expected in on_host.items():
        for mine, reference in zip(on_jax[verb].values, expected.values, strict=True):
            assert isinstance(mine, jax.Array)
            assert mine.dtype == reference.dtype
            np.testing.assert_array_equal(np.asarray(mine), reference, err_msg=verb)


def test_extremes_propagate_nan(tpus, jax):
    values = dv.PerReplica([jax.numpy.asarray([1.0, np.nan]), jax.numpy.asarray([np.nan, 2.0])])
    for op in ("min", "max"):
        assert np.isnan(np.asarray(tpus(2).reduce(op, values))).all()


@pytest.mark.wide
def test_custom_reductions_and_other_numbers(tpus, jax):
    fn = numba.njit(lambda a, b: a if a * a > b * b else b)
    larger = dv.CustomReduction(fn, 0, "larger")
    values = dv.PerReplica([jax.numpy.asarray([1.0, -5.0]), jax.numpy.asarray([-3.0, 2.0])])
    assert np.asarray(tpus(2).reduce(larger, values)).tolist() == [-3.0, -5.0]


@pytest.mark.wide
def test_new_arrays_lie_on_the_device_of_the_replica(tpus, jax):
    placed = tpus(8).run(lambda: jax.numpy.ones(2).devices())
    assert [devices for devices in placed.values] == [{device} for device in jax.devices("cpu")]


@pytest.mark.wide
@pytest.mark.parametrize("when", ["on_write", "on_read", "none"])
def test_checkpoints_in_both_directions(tpus, tmp_path, when):
    def make(strategy):
        with strategy.scope():
            v = dv.Variable(np.zeros(3, np.float32), synchronization=when, aggregation="sum")
        optimizer = dv.optimizers.SGD(0.1, momentum=0.5)
        pairs = [(np.ones(3, np.float32), v)]
        if when == "on_write":
            optimizer.apply_gradients(pairs)
        else:
            v.assign(dv.PerReplica([np.float32([1, 2, 3]), np.float32([4, 5, 6])]))
        return v, optimizer, dv.Checkpoint(v=v, optimizer=optimizer, strategy=strategy)

    def same(mine, other):
        """Compare the copies; of ON_READ variables a checkpoint keeps their aggregate."""
        if when == "on_read":
            return mine.numpy().tolist() == other.numpy().tolist()
        return np.asarray(mine.values).tolist() == np.asarray(other.values).tolist()

    v, optimizer, saving = make(tpus(2))
    saving.save(tmp_path / "jax")
    with dv.MirroredStrategy(2) as on_cpu:
        w, momentum, other = make(on_cpu)
        w.assign(np.zeros(3, np.float32))
        other.restore(tmp_path / "jax")
        assert same(w, v)
        other.save(tmp_path / "cpu")
    again, loaded, restoring = make(tpus(2))
    again.assign(np.ones(3, np.float32))
    restoring.restore(tmp_path / "cpu")
    assert same(again, v)
    if when == "on_write":
        assert loaded.slots(again)[0].numpy().tolist() == optimizer.slots(v)[0].numpy().tolist()
    assert loaded.iterations == optimizer.iterations == momentum.iterations


def test_batches_are_prefetched_to_the_devices(tpus, jax):
    strategy = tpus(2)
    data = dv.Dataset.range(8).batch(4)
    options = dv.InputOptions(prefetch_to_device=True)
    for batch in strategy.distribute_dataset(data, options):
        assert [part.devices() for part in batch.values] == [{d} for d in jax.devices("cpu")[:2]]


def test_values_move_between_devices(tpus, jax):
    value = dv.PerReplica([jax.numpy.ones(2), jax.numpy.zeros(2)])
    assert isinstance(value.copy_to("cpu:0").values[0], np.ndarray)
    moved = dv.PerReplica([np.ones(2), np.zeros(2)]).copy_to("jax:cpu:3")
    assert moved.values[0].devices() == {jax.devices("cpu")[3]}


def test_views_outlive_writes_that_nobody_donates(tpus):
    strategy = tpus(2)
    with strategy.scope():
        v = dv.Variable([1.0, 2.0])
        w = dv.Variable([0.0, 0.0])
    view = v.read_value()
    w.assign(v.read_value())
    v.assign([5.0, 6.0])
    assert view.tolist() == w.numpy().tolist() == [1.0, 2.0]


def test_refusals(tpus, jax):
    strategy = tpus(2)
    with pytest.raises(DeviceError, match=r"device of its own.*jax:cpu:0"):
        dv.TPUStrategy(["jax:cpu:0", "jax:cpu:0"])
    with pytest.raises(DeviceError, match="jax:cpu:99"):
        dv.TPUStrategy(["jax:cpu:99"])
    with pytest.raises(DeviceError, match="expected devices of JAX"):
        dv.TPUStrategy(["cpu:0"])
    with pytest.raises(DeviceError, match="no backend 'tpu'"):
        dv.TPUStrategy()
    with pytest.raises(DeviceError, match="one kind"):
        dv.MirroredStrategy(["cpu:0", "jax:cpu:0"])
    with pytest.raises(DeviceError, match="single copy"):
        dv.CentralStorageStrategy(["jax:cpu:0"], "jax:cpu:0")
    for options in ({"cross_device_ops": "nccl"}, {"bytes_per_bucket": 100}):
        with pytest.raises(AlgorithmError, match="XLA"):
            dv.MirroredStrategy(["jax:cpu:0", "jax:cpu:1"], **options)
    ones = jax.numpy.ones(2)
    with pytest.raises(BufferMismatchError, match="JAX, which nobody can write"):
        strategy.run(lambda: here().all_reduce("sum", ones, out=ones))
    with dv.MirroredStrategy(2) as on_cpu:
        with pytest.raises(ContextError, match="has others"):
            on_cpu.jit(lambda: None)
        with pytest.raises(ContextError, match="rng_key is for"):
            on_cpu.run(lambda: here().rng_key("a"))


def test_numbers_of_64_bits(tpus, x64):
    """Trap: JAX makes 32 bits of 64 without a word. A variable of 64 bits says how to have them."""
    with tpus(1).scope():
        if x64:
            assert dv.Variable(np.zeros(2)).dtype == np.float64
            return
        with pytest.raises(UnsupportedDTypeError, match="jax_enable_x64"):
            dv.Variable(np.zeros(2))
        with pytest.raises(UnsupportedDTypeError, match="dtype='int32'"):
            dv.Variable([1, 2], dtype="int64")
        v = dv.Variable([1.0, 2.0])  # data of Python: JAX's own rule
        v.assign(np.array([3.0, 4.0]))
        assert v.dtype == np.float32


def test_jax_is_asked_only_if_a_device_says_so():
    program = (
        "import sys, dvkernels as dv; dv.list_devices(); s = dv.MirroredStrategy(2);"
        "s.run(lambda: None); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_memories_are_found_by_their_arrays(jax):
    assert array_memory.holding(jax.numpy.ones(1)) is array_memory.of_jax()
