"""Asynchronous collectives, buckets, shared results, and clipping by the global norm."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from shorthands import context, replica

import dvkernels as dv
from dvkernels.errors import CollectiveMismatchError, UnsupportedDTypeError

ONE = np.ones(4)


@pytest.fixture
def two() -> Iterator[dv.Strategy]:
    with dv.MirroredStrategy(["cpu:0"] * 2) as made:
        yield made


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
def test_asynchronous_results_equal_blocking_ones(strategy: dv.Strategy, op: str) -> None:
    def body() -> bool:
        random = np.random.default_rng(replica())
        given = {"a": random.normal(size=(50, 3)), "b": [np.float32(random.normal()), (ONE,)]}
        kept = given["a"].copy()
        now = context().all_reduce(op, given)
        handle = context().all_reduce_async(op, given)
        later = handle.wait()
        assert handle.done()
        assert now["a"].tobytes() == later["a"].tobytes()
        assert now["b"][0].tobytes() == later["b"][0].tobytes()
        assert now["b"][0].dtype == later["b"][0].dtype == np.float32
        assert type(later["b"][1]) is tuple
        assert np.array_equal(given["a"], kept)
        assert not np.shares_memory(later["a"], given["a"])
        later["a"][...] = replica()  # results are owned by the caller
        context().barrier()
        return bool(np.all(later["a"] == replica()))

    assert all(strategy.run(body).values)


def test_handles_are_waited_for_in_any_order_or_never(strategy: dv.Strategy) -> None:
    count = strategy.num_replicas_in_sync

    def body() -> list[float]:
        handles = [context().all_reduce_async("sum", np.full(3, float(at))) for at in range(10)]
        order = np.random.default_rng(replica()).permutation(9)  # wait for all but the last
        results = {int(at): handles[at].wait() for at in order}
        between = context().all_reduce("sum", ONE)  # a blocking collective in between
        assert between.tolist() == [count] * 4
        return [float(results[at][0]) for at in range(9)]

    seen = strategy.run(body)
    assert [one.values for one in seen] == [(float(at * count),) * count for at in range(9)]


def test_waiting_twice_gives_the_same_result(two: dv.Strategy) -> None:
    def body() -> bool:
        handle = context().all_reduce_async("sum", ONE)
        return bool(np.array_equal(handle.wait(), handle.wait()))

    assert two.run(body).values == (True, True)


def test_collectives_progress_while_the_replica_computes(two: dv.Strategy) -> None:
    def body() -> bool:
        handle = context().all_reduce_async("sum", ONE)
        context().barrier()  # all replicas have issued the call
        deadline = time.monotonic() + 20
        while not handle.done() and time.monotonic() < deadline:
            time.sleep(0.001)
        return handle.done()

    assert two.run(body).values == (True, True)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    "odd",
    [
        lambda: context().all_reduce_async("max", ONE),
        lambda: context().all_reduce_async("sum", ONE[:2]),
        lambda: context().all_reduce_async("sum", ONE.astype("f4")),
        lambda: context().all_reduce_async("sum", [ONE]),
        lambda: None,
    ],
)
def test_asynchronous_calls_that_disagree(two: dv.Strategy, odd: Any, wait: bool) -> None:
    def body() -> None:
        handle = odd() if replica() else context().all_reduce_async("sum", ONE)
        if wait and handle is not None:
            handle.wait()

    with pytest.raises(CollectiveMismatchError, match="replica 1") as caught:
        two.run(body)
    assert "replica 0" in str(caught.value)
    assert two.run(lambda: context().all_reduce("sum", ONE))[1].tolist() == [2.0] * 4


def test_one_replica_fails_while_the_other_waits(two: dv.Strategy) -> None:
    boom = KeyError("boom")
    ended: list[BaseException] = []

    def body() -> None:
        if replica():
            raise boom
        try:  # either replica may notice
            context().all_reduce_async("sum", ONE).wait()
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(KeyError) as caught:
        two.run(body)
    assert caught.value is boom
    assert len(ended) == 1
    assert two.run(lambda: context().all_reduce_async("sum", ONE).wait())[0].tolist() == [2.0] * 4


def test_bad_input_of_an_asynchronous_call(two: dv.Strategy) -> None:
    for call, error in (
        (lambda: context().all_reduce_async("median", ONE), ValueError),
        (lambda: context().all_reduce_async("mean", np.ones(2, int)), UnsupportedDTypeError),
        (lambda: context().all_reduce_async("sum", "text"), TypeError),
    ):
        with pytest.raises(error):
            two.run(lambda call=call: call().wait())
    kept: list[Any] = []
    two.run(lambda: kept.append(context()))
    with pytest.raises(dv.errors.ContextError):
        kept[0].all_reduce_async("sum", ONE)


def test_the_progress_thread_ends_with_its_strategy() -> None:
    before = set(threading.enumerate())
    with dv.MirroredStrategy(["cpu:0"] * 2) as strategy:
        strategy.run(lambda: context().all_reduce_async("sum", ONE).wait())
    deadline = time.monotonic() + 5
    left = set(threading.enumerate()) - before
    while left and time.monotonic() < deadline:
        left = {one for one in left if one.is_alive() and "kernel" not in one.name}
        time.sleep(0.01)
    assert not left


@pytest.mark.parametrize("bucket", [1, 8, 100, 10**9])
@pytest.mark.parametrize("algorithm", ["auto", "direct", "ring"])
def test_buckets_change_nothing(bucket: int, algorithm: str) -> None:
    def nest(seed: int) -> Any:
        random = np.random.default_rng(seed)
        return {
            "w": [random.normal(size=size).astype("f4") for size in (0, 1, 7, 64)],
            "b": (
                random.integers(-9, 9, (2, 3)),
                random.normal(size=(5, 2)).T,
                np.array(float(seed)),
            ),
            "t": random.normal(size=33),
        }

    with dv.MirroredStrategy(
        ["cpu:0"] * 3, cross_device_ops=algorithm, bytes_per_bucket=bucket
    ) as strategy:

        def body() -> Any:
            given, kept = nest(replica()), nest(replica())
            result = context().all_reduce("sum", given)
            for one, same in zip(given["w"], kept["w"], strict=True):
                assert np.array_equal(one, same)
            later = context().all_reduce_async("sum", given).wait()
            assert later["t"].tobytes() == result["t"].tobytes()
            context().all_reduce("sum", given, out=given)
            np.testing.assert_allclose(given["t"], result["t"], rtol=1e-12, atol=1e-12)
            assert not np.array_equal(given["t"], kept["t"])
            return result

        seen = strategy.run(body)
    parts = [nest(at) for at in range(3)]
    for at, leaf in enumerate(seen["w"]):
        expected = sum(part["w"][at].astype("f8") for part in parts)
        for one in leaf.values:
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
            assert one.dtype == np.float32
            assert one.tobytes() == leaf[0].tobytes()
    integers = seen["b"][0]
    assert np.array_equal(integers[2], sum(part["b"][0] for part in parts))
    assert integers[0].dtype == parts[0]["b"][0].dtype
    np.testing.assert_allclose(seen["b"][1][0], sum(part["b"][1] for part in parts), rtol=1e-12)
    assert float(seen["b"][2][1]) == 3.0


def test_invalid_bucket_sizes_are_refused() -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=str(wrong)):
            dv.MirroredStrategy(["cpu:0"], bytes_per_bucket=wrong)
    for wrong in (1.5, "many"):
        with pytest.raises((TypeError, ValueError)):
            dv.MirroredStrategy(["cpu:0"], bytes_per_bucket=wrong)


def test_a_shared_result_is_one_array_for_all_replicas(strategy: dv.Strategy) -> None:
    seen = strategy.run(lambda: context().all_reduce("sum", [ONE, ONE[:2]], shared=True))
    for leaf in seen:
        for one in leaf.values:
            assert one is leaf[0] or np.shares_memory(one, leaf[0])
            with pytest.raises(ValueError, match="read-only"):
                one[0] = 5.0
            assert one[0] == strategy.num_replicas_in_sync
            assert not np.shares_memory(one, ONE)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16"])
def test_clipping_keeps_the_direction(dtype: str) -> None:
    gradients = {"a": np.array([3.0, 0.0]).astype(dtype), "b": [np.array(4.0).astype(dtype)]}
    clipped, norm = dv.optimizers.clip_by_global_norm(gradients, 2.5)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [1.5, 0.0], rtol=1e-3)
    np.testing.assert_allclose(clipped["b"][0], 2.0, rtol=1e-3)
    assert clipped["a"].dtype == clipped["b"][0].dtype == np.dtype(dtype)
    assert gradients["a"].tolist() == [3.0, 0.0]
    same, norm = dv.optimizers.clip_by_global_norm(gradients, 5.0)
    assert norm == 5.0
    assert same["a"].tobytes() == gradients["a"].tobytes()
    assert not np.shares_memory(same["a"], gradients["a"])
    zero, norm = dv.optimizers.clip_by_global_norm([np.zeros(3, dtype)], 1.0)
    assert (norm, zero[0].tolist()) == (0.0, [0.0] * 3)


def test_clipping_of_large_and_non_finite_gradients() -> None:
    clipped, norm = dv.optimizers.clip_by_global_norm([np.full(4, 3e38, "f4")], 1.0)
    assert norm == pytest.approx(6e38)
    np.testing.assert_allclose(clipped[0], 0.5, rtol=1e-5)
    for bad in (np.nan, np.inf):
        clipped, norm = dv.optimizers.clip_by_global_norm([np.array([bad, 1.0]), np.ones(2)], 1.0)
        assert not np.isfinite(norm)
        assert all(np.isnan(one).all() for one in clipped)
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="clip_norm"):
            dv.optimizers.clip_by_global_norm([np.ones(2)], wrong)
    with pytest.raises(UnsupportedDTypeError):
        dv.optimizers.clip_by_global_norm([np.ones(2, int)], 1.0)
    with pytest.raises(TypeError):
        dv.optimizers.clip_by_global_norm(["text"], 1.0)
