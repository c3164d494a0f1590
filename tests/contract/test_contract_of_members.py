"""Members of a strategy: pytrees, axes, destinations, and refused arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from kinds import devices, host, only_cpu
from shorthands import replica, variable

import dvkernels as dv
from dvkernels.errors import ContextError

UFUNCS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.fixture(params=["mirrored", "central", "one"])
def any_strategy(request: pytest.FixtureRequest) -> Iterator[dv.Strategy]:
    make = {
        "mirrored": lambda: dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:0"]),
        "central": lambda: dv.CentralStorageStrategy(["cpu:0", "cpu:1", "cpu:0"], "cpu:1"),
        "one": lambda: dv.OneDeviceStrategy(devices(1)[0]),
    }[request.param]
    with make() as strategy:
        yield strategy


def dealt(strategy: dv.Strategy, *values: Any) -> Any:
    return strategy.distribute_values_from_function(
        lambda context: values[context.replica_id_in_sync_group]
    )


def test_the_properties_of_a_strategy(any_strategy: dv.Strategy) -> None:
    count = any_strategy.num_replicas_in_sync
    assert count == len(any_strategy.worker_devices)
    assert any_strategy.cluster_resolver is None
    v = variable(any_strategy, 1.0)
    assert tuple(v.devices) == tuple(any_strategy.parameter_devices)
    assert type(any_strategy).__name__ in repr(any_strategy)


@only_cpu
def test_central_storage_keeps_its_copy_on_the_parameter_device() -> None:
    with dv.CentralStorageStrategy(devices(2), parameter_device="cpu:1") as strategy:
        v = variable(strategy, np.zeros(2))
        assert [str(device) for device in v.devices] == ["cpu:1"]
        assert [str(device) for device in strategy.worker_devices] == ["cpu:0", "cpu:1"]
        assert len(v.values) == 1
    with pytest.raises(dv.errors.DeviceError, match="cpu"):
        dv.CentralStorageStrategy(devices(1), parameter_device="tpu:0")
    with pytest.raises(dv.errors.DeviceError):
        dv.CentralStorageStrategy([])


def test_run_gives_per_replica_leaves(any_strategy: dv.Strategy) -> None:
    count = any_strategy.num_replicas_in_sync
    same = np.ones(2)
    for returned in (5, same, "text", (1, {"a": [2]})):
        result = any_strategy.run(lambda returned=returned: returned)
        leaf = result[1]["a"][0] if isinstance(returned, tuple) else result
        assert isinstance(leaf, dv.PerReplica)
        assert len(leaf) == count
    assert any_strategy.run(lambda: None) is None
    assert any_strategy.run(lambda: {"x": None})["x"] is None
    pair = any_strategy.run(lambda: Pair(replica(), [replica() * 10]))
    assert isinstance(pair, Pair)
    assert pair.left.values == tuple(range(count))
    assert pair.right[0].values == tuple(range(0, 10 * count, 10))


def test_run_refuses(two: dv.Strategy) -> None:
    assert two.run(lambda: None if replica() else 1).values == (1, None)
    with pytest.raises(ValueError, match=r"(?s)'?a'?.*'?b'?"):
        two.run(lambda: {"ab"[replica()]: 1})
    with pytest.raises(ValueError, match="replica"):
        two.run(lambda: [1] * (1 + replica()))
    for args in (5, np.ones(2), "text"):
        with pytest.raises(ValueError, match="must be a"):
            two.run(lambda *given: None, args=args)
    with pytest.raises(ValueError, match="must be a"):
        two.run(lambda *given: None, kwargs=[1])
    with pytest.raises(ContextError):
        two.run(lambda given: None, args=(dv.PerReplica([1, 2, 3]),))
    with pytest.raises(ContextError):
        two.run(lambda given: None, kwargs={"given": [{"a": dv.PerReplica([1])}]})
    with pytest.raises(TypeError):
        two.run(5)


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
@pytest.mark.parametrize(
    "axis",
    [None, 0, 1, -1, -2, [0], [1], [0, 1], [1, 0], (0, -1), [-1], [0, 2], [-3, -2, -1]],
    ids=str,
)
def test_reduce_along_any_axes(op: str, axis: Any) -> None:
    random = np.random.default_rng(3)
    ragged = axis is not None and 0 in np.atleast_1d(axis) % 3
    with dv.MirroredStrategy(devices(3)) as strategy:
        shapes = [(size, 2, 3) for size in ((2, 1, 4) if ragged else (2, 2, 2))]
        parts = [random.integers(-3, 4, shape).astype("f8") for shape in shapes]
        kept = [part.copy() for part in parts]
        result = strategy.reduce(op, dealt(strategy, *parts), axis=axis)
        if axis is None:
            together = np.stack(parts)
            axes: Any = 0
        elif ragged:
            together = np.concatenate(parts)
            axes = tuple(np.atleast_1d(axis) % 3)
        else:
            together = np.stack(parts)
            axes = (0, *(np.atleast_1d(axis) % 3 + 1))
        ufunc = UFUNCS.get(op)
        expected = together.mean(axes) if op == "mean" else ufunc.reduce(together, axes)
        np.testing.assert_allclose(result, expected, rtol=1e-14, atol=1e-14)
        assert result.dtype == np.float64
        assert all(map(np.array_equal, parts, kept))


def test_mean_is_weighted_by_the_number_of_elements(two: dv.Strategy) -> None:
    for dtype in ("f4", "f8"):
        value = dealt(two, np.arange(4, dtype=dtype), np.array([4, 5], dtype))
        assert two.reduce("mean", value, axis=0) == 2.5
        assert two.reduce("mean", value, axis=0).dtype == np.dtype(dtype)
        assert two.reduce("sum", value, axis=-1) == 15
    empty = dealt(two, np.arange(3.0), np.zeros(0))
    assert two.reduce("mean", empty, axis=0) == 1.0
    assert two.reduce("sum", empty, axis=0) == 3.0
    nest = {"a": dealt(two, np.ones((1, 2)), np.zeros((3, 2))), "b": [dealt(two, *np.ones((2, 1)))]}
    reduced = two.reduce("mean", nest, axis=0)
    assert reduced["a"].tolist() == [0.25, 0.25]
    assert reduced["b"][0].tolist() == 1.0


def test_reduce_is_like_numpy_with_integers(two: dv.Strategy) -> None:
    wrapped = two.reduce("sum", dealt(two, np.uint8(200), np.uint8(100)))
    assert (wrapped, wrapped.dtype) == (44, np.uint8)
    with pytest.raises(dv.errors.UnsupportedDTypeError):
        two.reduce("mean", dealt(two, np.int32(1), np.int32(2)))
    with pytest.raises(dv.errors.UnsupportedDTypeError):
        two.reduce("mean", dealt(two, np.ones(2, int), np.ones(3, int)), axis=0)


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
@pytest.mark.parametrize("dtype", ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("axis", [0, (0, 1), []])
def test_integers_along_an_axis_are_as_wide_as_numpys(
    two: dv.Strategy, op: str, dtype: str, axis: Any
) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 120, (4, 3)).astype(dtype) for _ in range(2)]
    found = two.reduce(op, dealt(two, *parts), axis=axis)
    whole = np.stack(parts)
    axes = (0, *(one + 1 for one in ([axis] if isinstance(axis, int) else axis)))
    expected = getattr(np, op)(whole, axis=axes)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    nothing = dealt(two, parts[0][:0], parts[1])
    if axis == 0:
        np.testing.assert_array_equal(
            two.reduce(op, nothing, axis=0), getattr(np, op)(parts[1], axis=0)
        )


WORDS = [np.array(["cat", "dog"]), np.array(["mouse"])]


@pytest.mark.parametrize(
    "parts",
    [
        WORDS,
        WORDS[::-1],
        [np.char.encode(part) for part in WORDS],
        [np.array(["a"], ">U3"), np.array(["abcde"], "<U5")],
        [np.array(["a"], ">U5"), np.array(["abc"], ">U3")],
        [np.array([], "U1"), np.array(["abc"])],
        [np.array("ab"), np.array("c")],
        [np.array([["a", "b"]]), np.array([["ccc", "d"]])],
    ],
    ids=lambda parts: f"{parts[0].dtype}{parts[1].dtype}",
)
def test_strings_are_gathered_in_the_wider_dtype(two: dv.Strategy, parts: Any) -> None:
    expected = np.concatenate([np.atleast_1d(part) for part in parts])
    across = two.gather(dealt(two, *parts))
    inside = two.run(lambda own: dv.get_replica_context().all_gather(own), (dealt(two, *parts),))
    for found in (across, *inside.values):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "parts",
    [
        [np.array(["a"]), np.array([b"a"])],
        [np.array(["a"]), np.array([1.0])],
        [np.array([1], "i4"), np.array([1], "i8")],
        [np.array([1.0], "f4"), np.array([1.0], "f8")],
        [np.array([["a", "b"]]), np.array([["a"]])],
    ],
    ids=lambda parts: f"{parts[0].dtype}{parts[1].dtype}",
)
def test_other_dtypes_are_not_promoted(two: dv.Strategy, parts: Any) -> None:
    with pytest.raises(dv.errors.BufferMismatchError):
        two.gather(dealt(two, *parts))
    with pytest.raises(dv.errors.CollectiveMismatchError):
        two.run(lambda own: dv.get_replica_context().all_gather(own), (dealt(two, *parts),))


def test_reduce_refuses(two: dv.Strategy) -> None:
    good = dealt(two, np.ones((2, 2)), np.ones((2, 2)))
    for plain in (1.0, 0.0, np.ones(2), [1, 2], None):
        for call in (lambda p=plain: two.reduce("sum", p), lambda p=plain: two.gather(p)):
            with pytest.raises(ValueError, match=r"PerReplica"):
                call()
    with pytest.raises(ValueError, match="PerReplica"):
        two.reduce("sum", {"good": good, "plain": 1.0})
    with pytest.raises(dv.errors.ReduceOpError, match=r"(?i)sum"):
        two.reduce("median", good)
    for axis in (2, -3, [0, 5]):
        with pytest.raises(ValueError, match=r"(?i)ax[ie]s"):
            two.reduce("sum", good, axis=axis)
    for axis in (0.5, "0", [0.5]):
        with pytest.raises((TypeError, ValueError)):
            two.reduce("sum", good, axis=axis)
    with pytest.raises(ValueError, match=r"replica 1"):
        two.reduce("sum", dealt(two, np.ones(2), np.ones(3)))
    with pytest.raises(ValueError, match=r"replica 1"):
        two.reduce("sum", dealt(two, np.ones(2), np.ones(2, "f4")))
    with pytest.raises((TypeError, ValueError)):
        two.reduce("sum", dealt(two, "a", "b"))
    for call in (two.reduce, two.gather):
        with pytest.raises(ContextError):
            call(*(("sum",) if call == two.reduce else ()), dv.PerReplica([1.0] * 3))


def test_a_variable_counts_as_one_value_per_replica(any_strategy: dv.Strategy) -> None:
    count = any_strategy.num_replicas_in_sync
    v = variable(any_strategy, np.array([1.0, 2.0]))
    assert any_strategy.reduce("sum", v).tolist() == [count, 2 * count]
    assert any_strategy.reduce("mean", v).tolist() == [1.0, 2.0]
    assert any_strategy.reduce("mean", v, axis=0) == 1.5
    assert any_strategy.gather(v).tolist() == [1.0, 2.0] * count
    assert any_strategy.reduce("sum", {"nested": [v]})["nested"][0].tolist() == [count, 2 * count]


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("dtype", ["f4", "i8", "?", "c16", "U3"])
def test_gather(two: dv.Strategy, axis: int, dtype: str) -> None:
    first = np.arange(6).reshape(2, 3).astype(dtype)
    second = np.concatenate([first, first], axis)
    nest = {"a": dealt(two, first, second), "b": (dealt(two, second, first),)}
    gathered = two.gather(nest, axis=axis)
    assert np.array_equal(gathered["a"], np.concatenate([first, second], axis))
    assert np.array_equal(gathered["b"][0], np.concatenate([second, first], axis))
    assert gathered["a"].dtype == np.dtype(dtype)
    assert not np.shares_memory(gathered["a"], first)


def test_gather_stacks_scalars_and_refuses(two: dv.Strategy) -> None:
    assert two.gather(dealt(two, 1.0, 2.0)).tolist() == [1.0, 2.0]
    assert two.gather(dealt(two, np.int8(1), np.int8(2))).dtype == np.int8
    assert two.gather([dv.PerReplica([True, False])])[0].tolist() == [True, False]
    with pytest.raises(ValueError, match="replica 1"):
        two.gather(dealt(two, np.ones((2, 2)), np.ones((2, 3))))
    with pytest.raises(ValueError, match="replica 1"):
        two.gather(dealt(two, np.ones(2), np.ones(2, "f4")))
    with pytest.raises(ValueError, match="replica 1"):
        two.gather(dealt(two, np.ones(2), np.ones((2, 2))))
    for axis in (1, -2):
        with pytest.raises(ValueError, match=r"(?i)axis"):
            two.gather(dealt(two, np.ones(2), np.ones(2)), axis=axis)


def test_local_results(any_strategy: dv.Strategy) -> None:
    count = any_strategy.num_replicas_in_sync
    value = any_strategy.run(replica)
    assert any_strategy.local_results(value) == tuple(range(count))
    assert any_strategy.local_results(7) == (7,) * count
    assert any_strategy.local_results(None) == (None,) * count
    nest = any_strategy.local_results({"a": value, "b": [3]})
    assert nest == tuple({"a": at, "b": [3]} for at in range(count))
    v = variable(any_strategy, 5.0)
    assert [float(one) for one in any_strategy.local_results(v)] == [5.0] * count


def test_values_from_a_function(any_strategy: dv.Strategy) -> None:
    count = any_strategy.num_replicas_in_sync
    seen = any_strategy.distribute_values_from_function(
        lambda context: {
            "id": context.replica_id_in_sync_group,
            "of": [context.num_replicas_in_sync, None],
        }
    )
    assert seen["id"].values == tuple(range(count))
    assert seen["of"][0].values == (count,) * count
    if count > 1:
        with pytest.raises(ValueError, match="same structure"):
            any_strategy.distribute_values_from_function(
                lambda context: [0] * context.replica_id_in_sync_group
            )


def test_names_of_tf_distribute(two: dv.Strategy) -> None:
    assert two.experimental_local_results(1) == two.local_results(1)
    assert two.experimental_distribute_values_from_function(lambda context: 1).values == (1, 1)
    batches = two.experimental_distribute_dataset(dv.Dataset.range(4).batch(4))
    assert [[part.tolist() for part in batch.values] for batch in batches] == [[[0, 1], [2, 3]]]


def test_update_acts_on_every_copy(any_strategy: dv.Strategy) -> None:
    v = variable(any_strategy, np.zeros(2), aggregation="sum", name="w")
    copies = len(v.values)
    seen: list[Any] = []

    def step(copy: Any, by: Any, *, scale: Any) -> float:
        assert dv.get_replica_context() is None
        assert dv.in_cross_replica_context()
        assert len(copy.values) == 1
        copy.assign_add(by * scale)
        copy.scatter_add([0], np.ones(1))
        copy.assign_sub(np.zeros(2))
        seen.append((copy.shape, copy.dtype, [str(device) for device in copy.devices]))
        return float(copy.numpy()[0])

    result = any_strategy.update(v, step, args=(np.ones(2),), kwargs={"scale": 3.0})
    assert isinstance(result, dv.Mirrored)
    assert list(result.values) == [4.0] * copies
    assert [copy.tolist() for copy in v.values] == [[4.0, 3.0]] * copies
    assert [one[2] for one in seen] == [[str(device)] for device in v.devices]
    ungrouped = any_strategy.update(v, lambda copy: copy.numpy()[1], group=False)
    assert ungrouped == (3.0,) * copies
    with any_strategy.scope():
        any_strategy.update(v, lambda copy: copy.assign(np.ones(2)))
    assert v.numpy().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mode", ["on_read", "none"])
def test_update_unpacks_its_arguments_per_copy(two: dv.Strategy, mode: str) -> None:
    v = variable(two, 0.0, synchronization=mode, aggregation="sum")
    given = dealt(two, *np.array([1, 2], v.dtype))
    other = variable(two, 10.0)
    two.update(v, lambda copy, by: copy.assign(by["x"][0]), args=({"x": [given]},))
    assert [float(one) for one in v.values] == [1.0, 2.0]
    two.update(v, lambda copy, by: copy.assign_add(by), args=(dv.Mirrored([v.dtype.type(1)] * 2),))
    assert [float(one) for one in v.values] == [2.0, 3.0]
    two.update(v, lambda copy, by: copy.assign(by.numpy()), args=(other,))
    assert [float(one) for one in v.values] == [10.0, 10.0]


def test_update_refuses(two: dv.Strategy) -> None:
    v = variable(two, np.zeros(2), name="w")
    calls: list[int] = []
    for given in ((dealt(two, 1.0, 2.0),), ([{"a": dealt(two, 1.0, 2.0)}],)):
        with pytest.raises(ValueError, match=r"PerReplica"):
            two.update(v, lambda copy, by: calls.append(1), args=given)
    with pytest.raises(ValueError, match="PerReplica"):
        two.update(v, lambda copy, by: calls.append(1), kwargs={"by": dealt(two, 1.0, 2.0)})
    assert calls == []
    with pytest.raises((TypeError, ValueError)):
        two.update(np.zeros(2), lambda copy: None)
    with pytest.raises(ContextError):
        two.run(lambda: two.update(v, lambda copy: copy.assign(np.ones(2))))
    with dv.MirroredStrategy(devices(3)) as other:
        with pytest.raises(ContextError):
            other.update(v, lambda copy: copy.assign(np.ones(2)))
        with pytest.raises(ContextError):
            two.update(v, lambda copy, by: by.numpy(), args=(variable(other, 1.0),))
    assert [copy.tolist() for copy in v.values] == [[0.0, 0.0]] * 2


def test_an_error_in_an_update_leaves_all_copies_alike(two: dv.Strategy) -> None:
    v = variable(two, np.zeros(2))
    calls: list[int] = []

    def half(copy: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the second copy")
        copy.assign(np.ones(2))

    with pytest.raises(KeyError, match="the second copy"):
        two.update(v, half)
    assert v.values[0].tobytes() == v.values[1].tobytes()
    with pytest.raises(ValueError, match="float64"):
        two.update(v, lambda copy: copy.assign(np.ones(2, "f4")))
    assert v.values[0].tobytes() == v.values[1].tobytes()


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_reduce_to_destinations(any_strategy: dv.Strategy, op: str) -> None:
    count = any_strategy.num_replicas_in_sync
    v = variable(any_strategy, np.zeros(3))
    parts = [np.full(3, at + 1.0) for at in range(count)]
    value = dealt(any_strategy, *parts)
    expected = {"sum": sum(parts), "mean": sum(parts) / count, "max": parts[-1]}[op]
    for destinations, length in ((v, len(v.values)), (value, count), ("cpu:1", 1)):
        result = any_strategy.reduce_to(op, value, destinations)
        assert isinstance(result, dv.Mirrored)
        assert len(result) == length
        for one in result.values:
            np.testing.assert_allclose(host(one), expected, rtol=1e-15)
            assert not any(np.shares_memory(host(one), part) for part in parts)
        for one, another in itertools.combinations(result.values, 2):
            assert one.tobytes() == another.tobytes()
        broadcast = any_strategy.broadcast_to(expected, destinations)
        assert isinstance(broadcast, dv.Mirrored)
        assert len(broadcast) == length
        for one in broadcast.values:
            assert np.array_equal(host(one), expected)
            assert not np.shares_memory(host(one), expected)
    assert [str(d) for d in any_strategy.reduce_to(op, value, "cpu:1").devices] == ["cpu:1"]
    assert any_strategy.reduce_to(op, value, dv.list_devices()[0]).values[0].shape == (3,)
    assert tuple(any_strategy.reduce_to(op, value, v).devices) == tuple(v.devices)
    pairs = [(value, v), (dealt(any_strategy, *[part[:2] for part in parts]), "cpu:0")]
    first, second = any_strategy.batch_reduce_to(op, pairs)
    np.testing.assert_allclose(host(first.values[0]), expected, rtol=1e-15)
    np.testing.assert_allclose(second.values[0], expected[:2], rtol=1e-15)
    assert (len(first), len(second)) == (len(v.values), 1)
    assert len(any_strategy.batch_reduce_to(op, [])) == 0


def test_the_result_of_reduce_to_can_be_assigned(any_strategy: dv.Strategy) -> None:
    v = variable(any_strategy, np.zeros(3))
    value = any_strategy.run(lambda: np.ones(3))
    total = any_strategy.reduce_to("sum", value, v)
    any_strategy.update(v, lambda copy, by: copy.assign_add(by), args=(total,))
    count = any_strategy.num_replicas_in_sync
    assert v.numpy().tolist() == [count] * 3


def test_reduce_to_refuses(two: dv.Strategy) -> None:
    v = variable(two, np.zeros(3))
    value = dealt(two, np.ones(3), np.ones(3))
    calls = {
        "plain": (lambda: two.reduce_to("sum", np.ones(3), v), ValueError),
        "op": (lambda: two.reduce_to("median", value, v), dv.errors.ReduceOpError),
        "device": (lambda: two.reduce_to("sum", value, "tpu:9"), dv.errors.DeviceError),
        "nowhere": (lambda: two.reduce_to("sum", value, None), (TypeError, ValueError)),
        "one of two": (
            lambda: two.batch_reduce_to("sum", [(value, v), (np.ones(3), v)]),
            ValueError,
        ),
        "misfit": (
            lambda: two.reduce_to("sum", dealt(two, np.ones(2), np.ones(3)), v),
            ValueError,
        ),
        "integers": (
            lambda: two.reduce_to("mean", dealt(two, np.ones(2, int), np.ones(2, int)), v),
            dv.errors.UnsupportedDTypeError,
        ),
        "length": (lambda: two.reduce_to("sum", dv.PerReplica([1.0] * 3), v), ContextError),
        "replica": (lambda: two.run(lambda: two.reduce_to("sum", value, v)), ContextError),
        "broadcast": (lambda: two.run(lambda: two.broadcast_to(np.ones(3), v)), ContextError),
        "broadcast device": (lambda: two.broadcast_to(np.ones(3), "tpu:9"), dv.errors.DeviceError),
    }
    for call, error in calls.values():
        with pytest.raises(error):
            call()
    assert [copy.tolist() for copy in v.values] == [[0.0] * 3] * 2
    assert [one.tolist() for one in value.values] == [[1.0] * 3] * 2


def test_a_destination_of_another_strategy(two: dv.Strategy) -> None:
    value = dealt(two, np.ones(3), np.ones(3))
    with dv.MirroredStrategy(devices(3)) as other:
        alien = variable(other, np.zeros(3))
        with pytest.raises(ContextError):
            two.reduce_to("sum", value, alien)
        with pytest.raises(ContextError):
            two.broadcast_to(np.ones(3), alien)


def test_devices() -> None:
    for wrong in ([], ["gpu:0"], ["cpu"], ["cpu:x"], ["cpu:-1"]):
        with pytest.raises((dv.errors.DeviceError, ValueError), match="cpu:0"):
            dv.MirroredStrategy(wrong)
    with pytest.raises((dv.errors.DeviceError, ValueError), match="cpu:0"):
        dv.OneDeviceStrategy("nothing:0")
    with pytest.raises(ValueError, match="ring"):
        dv.MirroredStrategy(devices(1), cross_device_ops="carrier pigeon")
    listed = dv.list_devices()
    assert [str(device) for device in dv.list_devices("cpu")] == [
        str(device) for device in listed if str(device).startswith("cpu")
    ]
    with dv.MirroredStrategy(["cpu:40", "cpu:40"]) as strategy:
        assert strategy.run(replica).values == (0, 1)


def test_after_close(any_strategy: dv.Strategy) -> None:
    v = variable(any_strategy, 1.0)
    any_strategy.run(lambda: None)
    any_strategy.close()
    any_strategy.close()
    assert v.numpy() == 1.0
