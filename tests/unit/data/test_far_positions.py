"""Large positions in endless and very long datasets are exact, or refused without a change."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.errors import DatasetError

ENDLESS = Dataset.range(10).repeat()
# For each pipeline: the element of the endless source that its element k is, in exact integers.
FAR: dict[str, tuple[Dataset, Callable[[int], int]]] = {
    "repeat": (ENDLESS, lambda k: k),
    "skip": (ENDLESS.skip(2**63 - 1), lambda k: k + 2**63 - 1),
    "shard": (ENDLESS.shard(10**12, 5), lambda k: k * 10**12 + 5),
    "shard of shard": (ENDLESS.shard(2**40, 1).shard(3, 2), lambda k: (k * 3 + 2) * 2**40 + 1),
    "shard of skip": (ENDLESS.skip(7).shard(2**62, 1), lambda k: k * 2**62 + 8),
    "long": (Dataset.range(10).repeat(2**62).repeat(2**62).shard(3, 1), lambda k: k * 3 + 1),
    "prefetch": (ENDLESS.shard(10**12, 5).prefetch(1), lambda k: k * 10**12 + 5),
    "map": (ENDLESS.map(lambda x: x).shard(2**50, 1), lambda k: k * 2**50 + 1),
}  # fmt: skip
PLACES = [0, 3, 2**40, 2**53 + 1, 2**62 - 1, 2**62 + 5, 2**63 - 10]


def at(dataset: Dataset, place: int) -> Any:
    with iter(DistributedDataset(dataset.batch(1), 1)) as batches:
        batches.load_state_dict({**batches.state_dict(), "position": place})
        return [int(next(batches).values[0][0]) for _ in range(3)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAR)
def test_elements_at_large_positions_match_the_arithmetic(name: str, place: int) -> None:
    dataset, index = FAR[name]
    assert at(dataset, place) == [index(place + k) % 10 for k in range(3)]


@pytest.mark.parametrize("name", FAR)
def test_batches_at_large_positions_match_the_arithmetic(name: str) -> None:
    dataset, index = FAR[name]
    with iter(DistributedDataset(dataset.batch(2**10), 1)) as batches:
        batches.load_state_dict({**batches.state_dict(), "position": 2**53 + 3})
        rows = next(batches).values[0].tolist()
    start = (2**53 + 3) * 2**10
    assert rows == [index(start + k) % 10 for k in range(2**10)]


@pytest.mark.parametrize("place", PLACES)
def test_windows_at_large_positions_hold_every_element_once(place: int) -> None:
    dataset = ENDLESS.shuffle(seed=1, window=5).batch(10)
    with iter(DistributedDataset(dataset, 1)) as batches:
        batches.load_state_dict({**batches.state_dict(), "position": place})
        rows = np.concatenate([next(batches).values[0] for _ in range(4)])
    counts = np.bincount(rows, minlength=10)
    assert counts.sum() == 40
    assert counts.min() >= 2  # windows of five: the first and last are incomplete


BAD = [-1, True, 1.0, 1.5, float("nan"), "3", None, [3], 2**63, 2**64, 10**30, 1 << 99999]


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("key", ["position", "epoch"])
@pytest.mark.parametrize("name", [*FAR, "window", "sequential"])
def test_invalid_positions_are_refused_and_nothing_changes(name: str, key: str, value: Any) -> None:
    more = {
        "window": ENDLESS.shuffle(seed=1, window=5),
        "sequential": Dataset.from_source(Tens()).filter(lambda x: True),
    }
    dataset = more[name] if name in more else FAR[name][0]
    with iter(DistributedDataset(dataset.batch(2), 1)) as batches:
        next(batches)
        before = batches.state_dict()
        with pytest.raises(DatasetError, match=rf"load_state_dict: expected {key} to be") as raised:
            batches.load_state_dict({**before, key: value})
        assert len(str(raised.value)) < 400
        assert batches.state_dict() == before
        next(batches)


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_invalid_positions_in_resume_points_are_refused(value: Any) -> None:
    data = Dataset.from_source(Tens()).filter(lambda x: True).batch(2)
    with iter(DistributedDataset(data, 1)) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        for entry in range(len(state["memory"])):
            for field in range(2):
                damaged = json.loads(json.dumps(state))
                damaged["memory"][entry][field] = value
                with pytest.raises(DatasetError, match="memory"):
                    batches.load_state_dict(damaged)
        assert next(batches).values[0].tolist() == [2, 3]


class Tens:
    """The integers 0 to 9, resumed by the source's own state."""

    def open(self, epoch: int, state: Any) -> Any:
        return TensReader(0 if state is None else state)


class TensReader:
    def __init__(self, at: int) -> None:
        self.at = at

    def __next__(self) -> int:
        if self.at == 10:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def state(self) -> int:
        return self.at


COUNTS: dict[str, Callable[[Any], Any]] = {
    "batch": lambda n: ENDLESS.batch(n),
    "take": lambda n: ENDLESS.take(n),
    "skip": lambda n: ENDLESS.skip(n),
    "shard": lambda n: ENDLESS.shard(n, 0),
    "shard, index": lambda n: ENDLESS.shard(3, n),
    "window": lambda n: ENDLESS.shuffle(seed=1, window=n),
    "prefetch": lambda n: ENDLESS.prefetch(n),
    "map": lambda n: ENDLESS.map(str, num_workers=n),
    "range": Dataset.range,
    "live": lambda n: Dataset.from_live(lambda timeout: 1, batch_size=n),
    "seed": lambda n: Dataset.range(3).shuffle(seed=n),
    "repeat": lambda n: Dataset.range(3).repeat("x" if n is None else n),
}


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", COUNTS)
def test_invalid_counts_are_refused_by_every_transform(name: str, value: Any) -> None:
    if name == "seed" and type(value) is int and 0 <= value < 2**1024:
        list(COUNTS[name](value))  # seeds may be long
        return
    if name in ("window", "live") and value is None:
        return  # as if the count were left out
    with pytest.raises(DatasetError, match="expected") as raised:
        COUNTS[name](value)
    assert len(str(raised.value)) < 400
