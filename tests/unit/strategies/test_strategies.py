"""Arguments and results of run; reduce and gather in cross-replica context."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from kinds import devices

import dvkernels as dv
from dvkernels.devices import array_memory
from dvkernels.errors import (
    AlgorithmError,
    BufferMismatchError,
    ContextError,
    DatasetError,
    UnsupportedDTypeError,
)

Pair = collections.namedtuple("Pair", "left right")


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(devices(2)) as strategy:
        yield strategy


def rank():
    return dv.get_replica_context().replica_id_in_sync_group


# -- run -----------------------------------------------------------------------------------------


def test_distributed_arguments_are_unpacked_at_any_depth(strategy):
    value = dv.PerReplica(["a", "b"])
    nest = Pair([value, 1], {"x": (dv.Mirrored([7, 7]),)})
    result = strategy.run(lambda n, *, k: (n.left[0], n.right["x"][0], k), (nest,), {"k": value})
    assert [leaf.values for leaf in result] == [("a", "b"), (7, 7), ("a", "b")]


def test_variables_are_passed_as_they_are(strategy):
    with strategy.scope():
        variable = dv.Variable(1.0, aggregation="sum")
    strategy.run(lambda v: v.assign_add(1.0), (variable,))
    assert float(variable) == 3.0
    assert strategy.run(lambda: variable) is variable


@pytest.mark.parametrize(
    "fn",
    [
        lambda: [1] * rank(),
        lambda: {"a": 1} if rank() else {"b": 1},
        lambda: (1,) if rank() else [1],
        lambda: {"a": 1} if rank() else None,
    ],
)
def test_different_structures_are_refused(strategy, fn):
    with pytest.raises(ValueError, match=r"replica 0 returned.*replica 1 returned"):
        strategy.run(fn)


def test_a_value_of_another_length_or_strategy(strategy):
    with dv.MirroredStrategy(devices(2)) as other:
        foreign = other.run(rank)
    for value in (dv.PerReplica([1, 2, 3]), foreign):
        for use in (
            lambda v=value: strategy.run(print, (v,)),
            lambda v=value: strategy.reduce("sum", v),
            lambda v=value: strategy.gather(v),
            lambda v=value: strategy.local_results(v),
        ):
            with pytest.raises(ContextError, match="2 replicas"):
                use()


# -- reduce --------------------------------------------------------------------------------------


def per_replica(*values, dtype=None):
    return dv.PerReplica([np.asarray(value, dtype) for value in values])


@pytest.mark.parametrize(
    ("op", "values", "axis", "expected"),
    [
        ("sum", [1.0, 2.0], None, 3.0),
        ("mean", [1.0, 2.0], None, 1.5),
        ("sum", [[1, 2], [3, 4]], 0, 10),
        ("mean", [[0.0, 1, 2, 3], [4.0, 5]], 0, 2.5),
        ("sum", [[0.0, 1, 2, 3], [4.0, 5]], 0, 15.0),
        ("mean", [[2.0, 4.0], []], 0, 3.0),
        ("max", [[2.0, 4.0], []], 0, 4.0),
        ("min", [[], [2.0]], 0, 2.0),
        ("prod", [[2.0, 3.0], [4.0]], -1, 24.0),
        ("mean", [[[1.0, 2]], [[3.0, 4]]], -1, [2.5]),
        ("mean", [[[1.0, 2]], [[3.0, 4]]], [0, 1], 2.5),
        ("mean", [[[1.0, 2]], [[3.0, 4]]], (-2, 1), 2.5),
        ("sum", [[[1.0, 2]], [[3.0, 4]]], 0, [4.0, 6.0]),
    ],
)
def test_reduce(strategy, op, values, axis, expected):
    result = strategy.reduce(op, per_replica(*values), axis=axis)
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, expected)


def test_the_dtype_of_a_reduction_is_numpys(strategy):
    for dtype in (np.int8, np.uint16, np.float32):
        value = per_replica([100, 100], [100, 100], dtype=dtype)
        total = strategy.reduce("sum", value, axis=0)
        assert (total, total.dtype) == (400, np.sum(value[0]).dtype)
    assert strategy.reduce("sum", per_replica(200, 100, dtype=np.uint8)) == 44


def test_reduce_takes_nests_and_variables(strategy):
    with strategy.scope():
        variable = dv.Variable(3.0)
    nest = {"a": per_replica(1.0, 2.0), "v": variable, "m": dv.Mirrored([1.0, 1.0])}
    result = strategy.reduce("sum", nest)
    assert {key: float(value) for key, value in result.items()} == {"a": 3.0, "v": 6.0, "m": 2.0}


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("sum", 1.0), ValueError),
        (("mean", np.ones(2), 0), ValueError),
        (("sum", None), ValueError),
        (("mean", per_replica(1, 2)), UnsupportedDTypeError),
        (("sum", per_replica([1.0], [1.0, 2.0])), BufferMismatchError),
        (("sum", per_replica([1.0], [1]), 0), BufferMismatchError),
        (("sum", per_replica([[1.0]], [[1.0, 2.0]]), 0), BufferMismatchError),
        (("sum", per_replica([1.0], [2.0]), 5), ValueError),
        (("sum", per_replica([1.0], [2.0]), 0.5), TypeError),
        (("mean", per_replica([], []), 0), ValueError),
        (("max", per_replica([], []), 0), ValueError),
        (("median", per_replica(1.0, 2.0)), ValueError),
    ],
)
def test_reduce_refuses(strategy, args, error):
    with pytest.raises(error):
        strategy.reduce(*args)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(3, float), ((), "complex64"), ([2, 0], bool), ((4, 5), "float16")]
)
def test_empty_makes_an_array_for_each_replica(strategy, shape, dtype):
    made = strategy.empty(shape, dtype)
    first, second = made.values
    assert first.shape == second.shape == np.empty(shape).shape
    assert first.dtype == second.dtype == dtype
    assert first is not second

    def step(own):
        own[...] = rank()
        here = dv.get_replica_context()
        return here.all_reduce("max" if own.dtype != "complex64" else "sum", own, out=own)

    found = strategy.gather(strategy.run(step, (made,)))
    assert (array_memory.holding(found).to_host(found) == 1).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        (-1, float, ValueError, r"must not be negative, got shape -1"),
        ((2, -3), float, ValueError, r"must not be negative, got shape \(2, -3\)"),
        (2.0, float, TypeError, "an integer or a list of them, got 2.0"),
        ("ab", float, TypeError, "an integer or a list of them, got 'ab'"),
        ([True], float, TypeError, "an integer or a list of them"),
        (3, object, UnsupportedDTypeError, "object"),
        (3, "U3", UnsupportedDTypeError, "U3"),
        (3, "no dtype", TypeError, "no dtype"),
    ],
)
def test_empty_refuses_what_cannot_be_reduced(strategy, shape, dtype, error, text):
    with pytest.raises(error, match=text):
        strategy.empty(shape, dtype)


def test_empty_belongs_to_cross_replica_context(strategy):
    with pytest.raises(ContextError, match="empty"):
        strategy.run(lambda: strategy.empty(3))
    other = dv.OneDeviceStrategy("cpu:0")
    with other.scope(), pytest.raises(ContextError, match="empty"):
        strategy.empty(3)


def test_a_strategy_is_described_by_its_properties(strategy):
    assert strategy.num_replicas_in_sync == 2
    assert [str(device) for device in strategy.worker_devices] == devices(2)
    assert strategy.cluster_resolver is None
    usable = dv.list_devices("cuda") or dv.list_devices("cpu")
    assert dv.MirroredStrategy().num_replicas_in_sync == len(usable)
    with pytest.raises(TypeError):
        __import__("copy").copy(strategy)


@pytest.mark.parametrize("ops", ["fastest", "nccl", 3, None])
def test_cross_device_ops_are_named(ops):
    with pytest.raises(AlgorithmError, match="'direct'"):
        dv.MirroredStrategy(devices(2), cross_device_ops=ops)


def test_something_else_than_a_dataset_is_refused(strategy):
    with pytest.raises(DatasetError, match="got a list"):
        strategy.distribute_dataset([1, 2, 3])


def test_a_custom_communicator():
    class Logged:
        """Delegates to the library's communicator and records the verbs."""

        size = 2

        def __init__(self):
            self.verbs = []

        def __getattr__(self, verb):
            from dvkernels.communicators.local import Local

            self.verbs.append(verb)
            return getattr(Local(2, "ring"), verb)

        all_reduce = property(lambda self: self.__getattr__("all_reduce"))
        reduce = property(lambda self: self.__getattr__("reduce"))
        reduce_scatter = property(lambda self: self.__getattr__("reduce_scatter"))
        all_gather = property(lambda self: self.__getattr__("all_gather"))
        broadcast = property(lambda self: self.__getattr__("broadcast"))

    logged = Logged()
    with dv.MirroredStrategy(devices(2), cross_device_ops=logged) as strategy:
        logged.verbs.clear()
        context = dv.get_replica_context
        assert strategy.run(lambda: context().all_reduce("sum", 1.0)).values == (2.0, 2.0)
        assert strategy.gather(dv.PerReplica([1, 2])).tolist() == [1, 2]
        assert logged.verbs == ["all_reduce", "all_gather"]
