"""The laws that ship with the package: correct subjects pass, and each single defect is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.testing import assert_same_on, check_communicator, check_strategy

UFUNCS = {"SUM": np.add, "MEAN": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum}


class Plain:
    """A communicator in plain NumPy."""

    def __init__(self, size: int) -> None:
        self.size = size

    def reduced(self, values: Sequence[Any], op: Any) -> Any:
        dtype = values[0].dtype
        wide = np.dtype("f4") if dtype.itemsize == 2 and dtype.kind in "fV" else dtype
        parts = [np.asarray(value).astype(wide) for value in values]
        if isinstance(op, dv.CustomReduction):
            total = parts[0]
            for part in parts[1:]:
                total = self.each(op, total, part)
            return total.astype(dtype)
        total = parts[0].copy()
        for part in parts[1:]:
            total = UFUNCS[op.name](total, part, dtype=None if wide.kind == "b" else wide)
        if op.name == "MEAN":
            total = total / wide.type(len(parts))
        return np.asarray(total).astype(dtype)

    def each(self, op: Any, left: Any, right: Any) -> Any:
        pairs = zip(left.ravel(), right.ravel(), strict=True)
        return np.array([op.fn(*pair) for pair in pairs], left.dtype).reshape(left.shape)

    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        total = self.reduced(values, op)
        if out is None:
            return [total.copy() for _ in values]
        for one in out:
            one[...] = total
        return list(out)

    def reduce(self, values: Sequence[Any], op: Any) -> Any:
        return self.reduced(values, op)

    def reduce_scatter(self, values: Sequence[Any], op: Any) -> list[Any]:
        return [part.copy() for part in np.array_split(self.reduced(values, op), self.size)]

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        return [np.concatenate(values, axis) for _ in values]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        return [np.array(values[root]) for _ in values]


class MeanIsSum(Plain):
    def reduced(self, values: Sequence[Any], op: Any) -> Any:
        mean = getattr(op, "name", "") == "MEAN"
        return super().reduced(values, dv.ReduceOp.SUM if mean else op)


class DropsTheLast(Plain):
    def reduced(self, values: Sequence[Any], op: Any) -> Any:
        return super().reduced(values[:-1] if len(values) > 2 else values, op)


class ReduceAlone(Plain):
    def reduce(self, values: Sequence[Any], op: Any) -> Any:
        return np.array(values[0])


class OneForAll(Plain):
    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        results = super().all_reduce(values, op, out)
        return results if out is not None else [results[0]] * len(values)


class WritesItsInput(Plain):
    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        results = super().all_reduce(values, op, out)
        if out is None:
            for value in values:
                value[...] = results[0]
        return results


class ForgetsOut(Plain):
    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        return super().all_reduce(values, op)


class GivesTheInputBack(Plain):
    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        if out is None and len(values) == 1:
            return list(values)
        return super().all_reduce(values, op, out)


class ScattersBackwards(Plain):
    def reduce_scatter(self, values: Sequence[Any], op: Any) -> list[Any]:
        return super().reduce_scatter(values, op)[::-1]


class ScattersShort(Plain):
    """Larger parts last."""

    def reduce_scatter(self, values: Sequence[Any], op: Any) -> list[Any]:
        total = self.reduced(values, op)
        sizes = [len(part) for part in np.array_split(total, self.size)][::-1]
        return [part.copy() for part in np.split(total, np.cumsum(sizes)[:-1])]


class GathersBackwards(Plain):
    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        return super().all_gather(values[::-1], axis)


class GathersAlongTheFirst(Plain):
    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        return super().all_gather(values, 0)


class RootIsZero(Plain):
    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        return super().broadcast(values, 0)


class SharesTheRoot(Plain):
    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        return [values[root] for _ in values]


class EachInItsOwnOrder(Plain):
    """Results equal up to rounding only."""

    def all_reduce(self, values: Sequence[Any], op: Any, out: Any = None) -> list[Any]:
        if out is not None:
            return super().all_reduce(values, op, out)
        turns = [[*values[rank:], *values[:rank]] for rank in range(len(values))]
        return [self.reduced(turn, op) for turn in turns]


class MinOfNumbers(Plain):
    """Hides NaN."""

    def reduced(self, values: Sequence[Any], op: Any) -> Any:
        if getattr(op, "name", "") == "MIN":
            return np.asarray(np.fmin.reduce([np.asarray(value) for value in values]))
        return super().reduced(values, op)


class WrongSize(Plain):
    def __init__(self, size: int) -> None:
        super().__init__(size + 1)

    def reduce_scatter(self, values: Sequence[Any], op: Any) -> list[Any]:
        return [part.copy() for part in np.array_split(self.reduced(values, op), len(values))]


DEFECTS = [
    MeanIsSum,
    DropsTheLast,
    ReduceAlone,
    OneForAll,
    WritesItsInput,
    ForgetsOut,
    GivesTheInputBack,
    ScattersBackwards,
    ScattersShort,
    GathersBackwards,
    GathersAlongTheFirst,
    RootIsZero,
    SharesTheRoot,
    EachInItsOwnOrder,
    MinOfNumbers,
    WrongSize,
]


def test_a_communicator_in_plain_numpy_keeps_the_laws() -> None:
    assert isinstance(Plain(2), dv.Communicator)
    check_communicator(Plain)


@pytest.mark.parametrize("broken", DEFECTS)
def test_each_defect_of_a_communicator_is_found(broken: Callable[[int], Any]) -> None:
    with pytest.raises((AssertionError, ValueError)) as caught:
        check_communicator(broken)
    assert str(caught.value)


def test_a_strategy_over_a_custom_communicator_keeps_the_laws() -> None:
    check_strategy(
        lambda count: dv.MirroredStrategy(["cpu:0"] * count, cross_device_ops=Plain(count))
    )


class Own(dv.Strategy):
    def __init__(self, count: int) -> None:
        super().__init__([f"cpu:{at}" for at in range(count)], Plain(count))


@pytest.mark.parametrize(
    "make",
    [
        Own,
        lambda count: dv.MirroredStrategy(["cpu:0"] * count),
        lambda count: dv.MirroredStrategy(["cpu:0"] * count, cross_device_ops="ring"),
        lambda count: dv.MirroredStrategy(["cpu:0"] * count, bytes_per_bucket=16),
    ],
)
def test_strategies_keep_the_laws(make: Callable[[int], dv.Strategy]) -> None:
    check_strategy(make)


class LosesErrors(Own):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        except Exception:
            return None


class ReducesWrong(Own):
    def reduce(self, op: Any, value: Any, axis: Any = None) -> Any:
        return super().reduce("sum", value, axis)


class GathersWrong(Own):
    def gather(self, value: Any, axis: int = 0) -> Any:
        return super().gather(value)


class ResultsWrong(Own):
    def local_results(self, value: Any) -> Any:
        return super().local_results(value)[::-1]


class DealsWrong(Own):
    def distribute_values_from_function(self, fn: Any) -> Any:
        return super().distribute_values_from_function(lambda context: fn(dv.ValueContext(0, 1)))


class RunsOne(Own):
    """Returns the first replica's result for all."""

    def run(self, fn: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = super().run(fn, args, kwargs)
        return dv.PerReplica([value[0]] * len(value)) if type(value) is dv.PerReplica else value


@pytest.mark.parametrize(
    "broken",
    [
        LosesErrors,
        ReducesWrong,
        RunsOne,
        GathersWrong,
        ResultsWrong,
        DealsWrong,
    ],
)
def test_each_defect_of_a_strategy_is_found(broken: Callable[[int], dv.Strategy]) -> None:
    with pytest.raises((AssertionError, dv.errors.DvKernelsError)):
        check_strategy(broken)


@pytest.mark.parametrize("defect", [MeanIsSum, DropsTheLast, ScattersBackwards, RootIsZero])
def test_a_broken_communicator_breaks_its_strategy(defect: Callable[[int], Any]) -> None:
    with pytest.raises(AssertionError):
        check_strategy(
            lambda count: dv.MirroredStrategy(["cpu:0"] * count, cross_device_ops=defect(count))
        )


DATA = np.arange(42.0).reshape(21, 2)


def regression(strategy: dv.Strategy) -> Any:
    """Run a step of gradient descent that is correct on any number of replicas."""
    with strategy.scope():
        weight = dv.Variable(np.zeros(2), aggregation="mean")
    count = strategy.num_replicas_in_sync
    parts = strategy.distribute_values_from_function(
        lambda context: np.array_split(DATA, count)[context.replica_id_in_sync_group]
    )

    def step(part: Any) -> None:
        gradient = (part @ weight.numpy() - 1.0) @ part / len(part)
        total = dv.get_replica_context().all_reduce("mean", gradient, weight=len(part))
        weight.assign_sub(1e-3 * total)

    for _ in range(3):
        strategy.run(step, (parts,))
    return {"weight": weight.numpy(), "loss": [strategy.reduce("mean", parts, axis=0)]}


def test_a_program_with_equal_results_on_all_replica_counts() -> None:
    assert_same_on(regression)
    assert_same_on(regression, replicas=(1, 5, 21))


@pytest.mark.parametrize(
    "fn",
    [
        lambda strategy: np.array(strategy.num_replicas_in_sync),
        lambda strategy: [np.zeros(strategy.num_replicas_in_sync)],
        lambda strategy: [np.zeros(2)] * strategy.num_replicas_in_sync,
        lambda strategy: strategy.reduce("sum", strategy.run(lambda: np.ones(3))),
        lambda strategy: np.zeros(2, "f4" if strategy.num_replicas_in_sync > 1 else "f8"),
        lambda strategy: {"x": np.array(np.nan if strategy.num_replicas_in_sync > 2 else 1.0)},
        lambda strategy: {str(strategy.num_replicas_in_sync): np.zeros(1)},
    ],
)
def test_a_program_that_differs_is_found(fn: Callable[[dv.Strategy], Any]) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same_on(fn)
    assert any(number in str(caught.value) for number in "237")


def test_an_error_in_the_program_is_reraised() -> None:
    def broken(strategy: dv.Strategy) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        assert_same_on(broken)
    assert not dv.has_strategy()
