"""Epochs of repeated loops: each loop sees the next epoch, or the epoch that it sets."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dvkernels as dv
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import EpochCounts
from dvkernels.errors import DatasetError

SHUFFLED = Dataset.range(64).shuffle(seed=1).batch(16)


def order(batches: Any) -> list[int]:
    return [int(x) for batch in batches for part in batch.values for x in part]


@pytest.fixture
def strategy() -> Iterator[dv.MirroredStrategy]:
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as opened:
        yield opened


def expected(epochs: range | list[int]) -> list[list[int]]:
    return [[int(x) for batch in SHUFFLED.with_epoch(epoch) for x in batch] for epoch in epochs]


def test_loops_that_distribute_anew_see_the_orders_of_one_distributed_dataset(
    strategy: dv.MirroredStrategy,
) -> None:
    data = SHUFFLED.take(4)
    once = strategy.distribute_dataset(SHUFFLED)
    wanted = [order(once) for _ in range(3)]
    assert len({tuple(epoch) for epoch in wanted}) == 3
    assert wanted == expected(range(3))
    assert [order(strategy.distribute_dataset(data)) for _ in range(3)] == wanted
    chosen = [order(strategy.distribute_dataset(SHUFFLED.with_epoch(k))) for k in (2, 0, 1)]
    assert chosen == [wanted[2], wanted[0], wanted[1]]


def test_each_strategy_counts_for_itself_and_one_distributed_dataset_too(
    strategy: dv.MirroredStrategy,
) -> None:
    data = SHUFFLED.take(4)
    first, second = (strategy.distribute_dataset(data) for _ in range(2))
    assert [order(first), order(second), order(first)] == expected([0, 0, 1])
    with dv.OneDeviceStrategy("cpu:0") as other:
        assert order(other.distribute_dataset(data)) == expected([0])[0]
    assert order(strategy.distribute_dataset(data)) == expected([2])[0]


def test_a_resumed_loop_continues_with_the_next_epoch(strategy: dv.MirroredStrategy) -> None:
    batches = iter(strategy.distribute_dataset(SHUFFLED.with_epoch(4)))
    head = order([next(batches)])
    state = json.loads(json.dumps(batches.state_dict()))
    data = SHUFFLED.take(4)
    resumed = iter(strategy.distribute_dataset(SHUFFLED.with_epoch(0)))
    resumed.load_state_dict(state)  # the epoch is no part of the pipeline
    assert head + order(resumed) == expected([4])[0]
    again = iter(strategy.distribute_dataset(data))
    again.load_state_dict({**state, "pipeline": again.state_dict()["pipeline"]})
    assert order(strategy.distribute_dataset(data)) == expected([5])[0]


def test_transforms_keep_the_epoch_and_zip_needs_equal_epochs() -> None:
    shuffled = Dataset.range(6).shuffle(seed=1)
    wanted = [int(x) for x in shuffled.with_epoch(3)]
    early = shuffled.with_epoch(3).map(int).filter(lambda x: True).take(6).prefetch(1)
    assert list(early) == wanted
    assert [a for a, _ in early.zip(early)] == wanted
    with pytest.raises(DatasetError, match="got 3 for this one and None for argument 0"):
        early.zip(shuffled)
    assert repr(early).endswith(".with_epoch(3)")


@pytest.mark.parametrize(
    "epoch", [-1, True, 1.0, float("nan"), "1", None, 2**63, 1 << 99999], ids=type
)
def test_invalid_epochs_are_refused(epoch: Any) -> None:
    with pytest.raises(DatasetError, match=r"with_epoch: expected epoch"):
        SHUFFLED.with_epoch(epoch)


@pytest.mark.parametrize("stateful", [False, True])
def test_a_factory_receives_the_epoch_on_request(
    strategy: dv.MirroredStrategy, stateful: bool
) -> None:
    class Numbers:
        def __init__(self, epoch: int) -> None:
            self.left = [epoch, epoch + 10]

        def __iter__(self) -> Numbers:
            return self

        def __next__(self) -> int:
            if not self.left:
                raise StopIteration
            return self.left.pop(0)

        def state_dict(self) -> dict[str, Any]:
            return {"left": list(self.left)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.left = list(state["left"])

    data = Dataset.from_iterable(Numbers, epoch=True, stateful=stateful)
    assert list(data.repeat(2).with_epoch(3)) == [6, 16, 7, 17]
    distributed = strategy.distribute_dataset(data.batch(1))
    assert [order(distributed) for _ in range(3)] == [[0, 10], [1, 11], [2, 12]]
    with pytest.raises(DatasetError, match="epoch to be True or False; got 1"):
        Dataset.from_iterable(Numbers, epoch=1, stateful=stateful)  # type: ignore[arg-type]


def test_an_input_context_holds_the_epoch(strategy: dv.MirroredStrategy) -> None:
    told: list[int] = []

    def make(context: dv.InputContext) -> Dataset:
        told.append(context.epoch)
        return Dataset.range(64).shuffle(seed=1).batch(8)

    class Holder:
        def make(self, context: dv.InputContext) -> Dataset:
            return make(context)

    holder = Holder()
    for each in (
        lambda: make,
        lambda: holder.make,
    ):  # bound methods are new objects
        told.clear()
        got = [order(strategy.distribute_datasets_from_function(each())) for _ in range(3)]
        assert told == [0, 1, 2]
        assert got == expected(range(3))
    assert dv.InputContext(2, 0, 4).epoch == 0


def test_a_counter_is_collected_with_its_dataset() -> None:
    epochs = EpochCounts()
    data: Dataset | None = Dataset.range(3).batch(1)
    epochs.of(data).next = 4
    assert epochs.of(data).next == 4
    gone = weakref.ref(data)
    data = None
    gc.collect()
    assert gone() is None
    for unknowable in (3, [], print):
        made: Callable[..., Any] | Any = unknowable
        assert epochs.of(made).next == 0
