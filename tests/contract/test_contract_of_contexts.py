"""Contexts: which calls are allowed in each, and that refused calls change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from shorthands import context, replica

import dvkernels as dv
from dvkernels.errors import CollectiveMismatchError, ContextError


@pytest.fixture
def other() -> Iterator[dv.Strategy]:
    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:
        yield strategy


def where() -> tuple[bool, bool, bool, int]:
    context = dv.get_replica_context()
    return (
        dv.has_strategy(),
        dv.in_cross_replica_context(),
        context is None,
        dv.get_strategy().num_replicas_in_sync,
    )


OUTSIDE = (False, False, False, 1)
ACROSS = (True, True, True, 2)
WITHIN = (True, False, False, 2)


def test_the_current_context(two: dv.Strategy) -> None:
    assert where() == OUTSIDE
    assert dv.get_strategy() is dv.get_strategy()
    with two.scope() as entered:
        assert where() == ACROSS
        assert dv.get_strategy() is entered is two
        with two.scope():
            assert where() == ACROSS
        assert where() == ACROSS
    assert where() == OUTSIDE
    raw: list[Any] = []
    two.run(lambda: raw.append((where(), dv.get_strategy() is two)))
    assert raw == [(WITHIN, True)] * 2
    on = two.run(lambda: str(dv.get_replica_context().device))
    assert [*on.values] == [str(device) for device in two.worker_devices]
    raw.clear()
    two.run(lambda: dv.get_replica_context().merge_call(lambda s: raw.append((where(), s is two))))
    assert raw == [(ACROSS, True)]
    raw.clear()
    with two.scope():
        v = dv.Variable(1.0)
    two.update(v, lambda copy: raw.append(where()))
    assert raw == [ACROSS] * 2
    assert where() == OUTSIDE


def test_the_default_replica_context() -> None:
    context = dv.get_replica_context()
    assert (context.replica_id_in_sync_group, context.num_replicas_in_sync) == (0, 1)
    assert context.strategy is dv.get_strategy()
    assert context.all_reduce("sum", 2.5) == 2.5
    given = np.ones(2)
    for result in (
        context.all_reduce("sum", given),
        context.all_gather(given),
        context.reduce_scatter("sum", given),
        context.broadcast(given),
    ):
        assert result.tolist() == [1.0, 1.0]
        assert not np.shares_memory(result, given)
    assert context.merge_call(lambda strategy, x: dv.in_cross_replica_context(), (1,)) is True
    context.barrier()


def forbidden_in_a_replica(strategy: dv.Strategy, other: dv.Strategy) -> dict[str, Callable]:
    value = dv.PerReplica([np.ones(2)] * strategy.num_replicas_in_sync)
    dataset = dv.Dataset.range(8).batch(4)
    iterator = iter(strategy.distribute_dataset(dataset))
    return {
        "own scope": lambda: strategy.scope().__enter__(),
        "another scope": lambda: other.scope().__enter__(),
        "run": lambda: strategy.run(lambda: None),
        "another run": lambda: other.run(lambda: None),
        "reduce": lambda: strategy.reduce("sum", value),
        "gather": lambda: strategy.gather(value),
        "dataset": lambda: strategy.distribute_dataset(dataset),
        "values": lambda: strategy.distribute_values_from_function(lambda context: 1),
        "next": lambda: next(iterator),
        "set_strategy": lambda: dv.set_strategy(other),
    }


@pytest.mark.parametrize(
    "name",
    [
        "own scope",
        "another scope",
        "run",
        "another run",
        "reduce",
        "gather",
        "dataset",
        "values",
        "next",
        "set_strategy",
    ],
)
def test_forbidden_in_a_replica(two: dv.Strategy, other: dv.Strategy, name: str) -> None:
    call = forbidden_in_a_replica(two, other)[name]
    with pytest.raises(ContextError):
        two.run(call)

    def one() -> str:
        try:
            call()
        except ContextError as error:
            return str(error)
        return ""

    # Refused at the call, without a rendezvous; the step continues.
    said = two.run(lambda: one() if dv.get_replica_context().replica_id_in_sync_group else "")
    assert said[1]
    assert said[0] == ""
    assert where() == OUTSIDE


def test_forbidden_under_another_scope(two: dv.Strategy, other: dv.Strategy) -> None:
    value = two.run(lambda: np.ones(2))
    with two.scope():
        v = dv.Variable(np.ones(2))
    with other.scope():
        for call in (
            lambda: two.scope().__enter__(),
            lambda: two.run(lambda: None),
            lambda: two.reduce("sum", value),
            lambda: two.gather(value),
            lambda: v.assign(np.zeros(2)),
            lambda: v.read_value(),
            lambda: two.update(v, lambda copy: copy.assign(np.zeros(2))),
            lambda: dv.set_strategy(two),
            lambda: dv.set_strategy(None),
        ):
            with pytest.raises(ContextError):
                call()
        assert dv.get_strategy() is other
    assert v.numpy().tolist() == [1.0, 1.0]
    with pytest.raises(ContextError):
        other.reduce("sum", value)
    with pytest.raises(ContextError):
        other.gather(value)
    with pytest.raises(ContextError):
        other.local_results(value)
    with pytest.raises(ContextError):
        other.run(lambda given: given, args=(value,))


def test_a_context_after_its_run(two: dv.Strategy) -> None:
    kept: list[dv.ReplicaContext] = []
    two.run(lambda: kept.append(dv.get_replica_context()))
    one = np.ones(2)
    for old in kept:
        for call in (
            lambda old=old: old.all_reduce("sum", one),
            lambda old=old: old.all_gather(one),
            lambda old=old: old.reduce_scatter("sum", one),
            lambda old=old: old.broadcast(one),
            lambda old=old: old.merge_call(lambda strategy: None),
            lambda old=old: old.barrier(),
        ):
            with pytest.raises(ContextError, match="has ended"):
                call()
            with pytest.raises(ContextError, match="has ended"):
                two.run(call)  # also in the next step
    assert two.run(lambda: 1).values == (1, 1)


def test_a_thread_that_a_replica_starts_is_outside(two: dv.Strategy) -> None:
    seen: list[Any] = []

    def stray() -> None:
        thread = threading.Thread(target=lambda: seen.append(where()))
        thread.start()
        thread.join()

    two.run(stray)
    assert seen == [OUTSIDE] * 2


def test_set_strategy(two: dv.Strategy, other: dv.Strategy) -> None:
    dv.set_strategy(two)
    try:
        assert where() == ACROSS
        with two.scope(), pytest.raises(ContextError):
            dv.set_strategy(None)
        raw: list[Any] = []
        two.run(lambda: raw.append(where()))
        assert raw == [WITHIN] * 2
        assert len(dv.Variable(1.0).values) == 2
    finally:
        dv.set_strategy(None)
    assert where() == OUTSIDE
    with pytest.raises(TypeError, match="strategy or None"):
        dv.set_strategy("two")


def test_an_error_in_a_scope_ends_the_scope(two: dv.Strategy) -> None:
    with pytest.raises(KeyError), two.scope():
        raise KeyError
    assert where() == OUTSIDE
    with pytest.raises(KeyError):
        two.run(lambda: {}["missing"])
    assert where() == OUTSIDE

    def merged(strategy: dv.Strategy) -> None:
        raise KeyError("merged")

    with pytest.raises(KeyError, match="merged"):
        two.run(lambda: dv.get_replica_context().merge_call(merged))
    assert where() == OUTSIDE
    assert two.run(lambda: 1).values == (1, 1)


def test_each_replica_sees_the_callers_errstate(two: dv.Strategy) -> None:
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        two.run(lambda: np.ones(1) / np.zeros(1))
    with np.errstate(divide="ignore"):
        assert np.isinf(two.run(lambda: np.ones(1) / np.zeros(1))[1])


ONE = np.ones(4, "f4")
# What replica 1 does while replica 0 calls all_reduce("sum", ones of float32[4]).
DISAGREEMENTS: dict[str, Callable[[dv.ReplicaContext], Any]] = {
    "collective": lambda context: context.all_gather(ONE),
    "merge_call": lambda context: context.merge_call(lambda strategy: None),
    "barrier": lambda context: context.barrier(),
    "op": lambda context: context.all_reduce("max", ONE),
    "shape": lambda context: context.all_reduce("sum", ONE[:3]),
    "dtype": lambda context: context.all_reduce("sum", ONE.astype("f8")),
    "structure": lambda context: context.all_reduce("sum", [ONE]),
    "returned": lambda context: None,
    "weight": lambda context: context.all_reduce("mean", ONE, weight=1.0),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_disagreement_names_the_replica_the_call_and_the_line(name: str, odd: int) -> None:
    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:
        with strategy.scope():
            v = dv.Variable(1.0, aggregation="sum")

        def body() -> None:
            context = dv.get_replica_context()
            if replica() == odd:
                DISAGREEMENTS[name](context)
                return
            context.all_reduce("sum", ONE)
            v.assign(5.0)

        with pytest.raises(CollectiveMismatchError) as caught:
            strategy.run(body)
        said = str(caught.value)
        assert f"replica {odd}" in said
        assert "all_reduce" in said
        assert "test_contract_of_contexts.py" in said
        if name == "returned":
            assert "return" in said
        assert v.numpy() == 1.0
        total = strategy.run(lambda: dv.get_replica_context().all_reduce("sum", ONE))
        assert [one.tolist() for one in total.values] == [[3.0] * 4] * 3


@pytest.mark.parametrize(
    "body",
    [
        lambda: context().broadcast(ONE, root=replica()),
        lambda: context().all_gather(np.ones((2, 2)), axis=replica()),
        lambda: [context().barrier() for _ in range(1 + replica())],
    ],
    ids=["root", "axis", "one more"],
)
def test_disagreement_about_an_option_or_the_number_of_calls(two: dv.Strategy, body: Any) -> None:
    with pytest.raises(CollectiveMismatchError, match=r"(?s)replica 0.*replica 1") as caught:
        two.run(body)
    assert "test_contract_of_contexts.py" in str(caught.value)
    assert two.run(lambda: 1).values == (1, 1)


def test_a_caught_failure_still_ends_the_step(two: dv.Strategy) -> None:
    again: list[BaseException] = []

    def body() -> int:
        context = dv.get_replica_context()
        try:
            context.all_reduce("sum" if replica() else "max", ONE)
        except CollectiveMismatchError:
            for call in (context.barrier, lambda: context.all_gather(ONE)):
                try:
                    call()
                except Exception as error:
                    again.append(error)
        return 1

    with pytest.raises(CollectiveMismatchError):
        two.run(body)
    assert len(again) == 4
    assert two.run(lambda: 1).values == (1, 1)


def test_exceptions_are_reraised_unchanged() -> None:
    errors = [KeyError("zero"), ValueError("one"), OSError("two")]
    with dv.MirroredStrategy(["cpu:0"] * 3) as strategy:
        for raisers in ({0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1, 2}):
            for late in (False, True):
                met = threading.Barrier(len(raisers))

                def body(raisers: Any = raisers, late: bool = late, met: Any = met) -> None:
                    if late:
                        dv.get_replica_context().all_reduce("sum", ONE)
                    if replica() in raisers:
                        if not late:
                            met.wait(10)
                        raise errors[replica()]
                    dv.get_replica_context().barrier()

                with pytest.raises((KeyError, ValueError, OSError)) as caught:
                    strategy.run(body)
                assert any(caught.value is errors[one] for one in raisers)
                if not late:  # every replica raises its own error
                    assert caught.value is errors[min(raisers)]
                    notes = " ".join(caught.value.__notes__)
                    assert all(f"replica {one}" in notes for one in raisers)
                    assert all(errors[one].args[0] in notes for one in raisers - {min(raisers)})
                for error in errors:
                    error.__notes__ = []


def test_merge_call_returns_each_replica_its_component(two: dv.Strategy) -> None:
    def merged(strategy: dv.Strategy, mine: Any, plain: Any, *, key: Any) -> Any:
        assert strategy is two
        assert isinstance(mine, dv.PerReplica)
        assert [isinstance(leaf, dv.PerReplica) for leaf in (plain["a"], key[0])] == [True, True]
        inner = strategy.run(lambda x: x * 10, args=(mine,))
        return {"dealt": inner, "all": strategy.reduce("sum", mine)}

    def body() -> Any:
        context = dv.get_replica_context()
        return context.merge_call(merged, (replica() + 1, {"a": 5}), {"key": [6]})

    result = two.run(body)
    assert [int(one) for one in result["dealt"].values] == [10, 20]
    assert [int(one) for one in result["all"].values] == [3, 3]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_results_are_new_arrays_and_inputs_are_unchanged(replicas: int) -> None:
    with dv.MirroredStrategy(["cpu:0"] * replicas) as strategy:

        def body() -> Any:
            context = dv.get_replica_context()
            given = {"a": np.arange(6.0).reshape(3, 2), "b": [np.ones(3), (np.float32(2.0),)]}
            kept = {"a": given["a"].copy(), "b": given["b"][0].copy()}
            results = [
                context.all_reduce("sum", given),
                context.all_reduce("mean", given, weight=replica() + 1.0),
                context.broadcast(given),
                context.all_gather({"a": given["a"]}, axis=-1),
                context.reduce_scatter("sum", {"a": given["a"]}),
            ]
            for result in results:
                assert result["a"].flags.writeable
                assert not np.shares_memory(result["a"], given["a"])
                result["a"][...] = 99.0
            context.barrier()  # the results of other replicas are different memory
            assert all(np.all(result["a"] == 99.0) for result in results)
            assert np.array_equal(given["a"], kept["a"])
            assert np.array_equal(given["b"][0], kept["b"])
            out = np.zeros((3, 2))
            assert context.all_reduce("sum", given["a"], out=out) is out
            assert np.array_equal(given["a"], kept["a"])
            assert np.array_equal(out, kept["a"] * replicas)
            back = context.all_reduce("sum", given["a"], out=given["a"])
            assert back is given["a"]
            assert np.array_equal(given["a"], kept["a"] * replicas)
            return np.shares_memory(back, given["a"])

        assert all(strategy.run(body).values)


def test_the_weighted_mean_is_that_of_all_examples() -> None:
    data = np.arange(10.0)
    parts = [data[:5], data[5:9], data[9:], data[:0]]
    with dv.MirroredStrategy(["cpu:0"] * 4) as strategy, np.errstate(invalid="ignore"):

        def body() -> Any:
            part = parts[replica()]
            mean = part.mean() if len(part) else np.nan
            context = dv.get_replica_context()
            return context.all_reduce("mean", np.array(mean), weight=len(part))

        assert [float(one) for one in strategy.run(body).values] == pytest.approx([4.5] * 4)


@pytest.mark.parametrize(
    ("op", "weight"), [("mean", 0), ("mean", -1), ("mean", np.nan), ("mean", "x"), ("sum", 1)]
)
def test_an_invalid_weight_is_refused(strategy: dv.Strategy, op: str, weight: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        strategy.run(lambda: context().all_reduce(op, 1.0, weight=weight))


BAD_INPUT: dict[str, tuple[Callable[[], Any], Any]] = {
    "op": (lambda: context().all_reduce("median", ONE), dv.errors.ReduceOpError),
    "mean of integers": (
        lambda: context().all_reduce("mean", np.ones(3, "i4")),
        dv.errors.UnsupportedDTypeError,
    ),
    "text": (
        lambda: context().all_reduce("sum", "text"),
        (dv.errors.UnsupportedDTypeError, dv.errors.NotABufferError),
    ),
    "texts": (
        lambda: context().all_reduce("sum", np.array(["x"])),
        dv.errors.UnsupportedDTypeError,
    ),
    "None": (lambda: context().all_reduce("sum", None), dv.errors.NotABufferError),
    "object": (lambda: context().all_reduce("sum", [[1, object()]]), dv.errors.NotABufferError),
    "axis": (lambda: context().all_gather(ONE, axis=1), ValueError),
    "root": (lambda: context().broadcast(ONE, root=9), ValueError),
    "negative root": (lambda: context().broadcast(ONE, root=-3), ValueError),
    "out": (
        lambda: context().all_reduce("sum", ONE.copy(), out=np.ones(3, "f4")),
        dv.errors.BufferMismatchError,
    ),
    "list as out": (
        lambda: context().all_reduce("sum", np.ones(2), out=[1, 2]),
        dv.errors.BufferMismatchError,
    ),
    "scalar to scatter": (
        lambda: context().reduce_scatter("sum", np.array(1.0)),
        dv.errors.BufferMismatchError,
    ),
    "arguments": (lambda: context().merge_call(print, args=3), ValueError),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_to_collectives(strategy: dv.Strategy, name: str) -> None:
    call, error = BAD_INPUT[name]
    with pytest.raises(error):
        strategy.run(call)
    assert strategy.run(replica).values == tuple(range(strategy.num_replicas_in_sync))


def test_an_out_that_cannot_take_the_result(two: dv.Strategy) -> None:
    frozen = np.ones(4)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        two.run(lambda: context().all_reduce("sum", frozen, out=frozen))
    assert frozen.tolist() == [1.0] * 4
    same = np.ones(4)
    with pytest.raises(ValueError, match=r"(?i)share|overlap"):
        two.run(lambda: context().all_reduce("sum", np.ones(4), out=same))
    assert same.tolist() == [1.0] * 4
