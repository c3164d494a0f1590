"""A saved position is accepted for the same data, and after a repeat count has grown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.iterator import DistributedIterator
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError

X = np.arange(20.0)


def begun(dataset: Dataset, steps: int, **options: Any) -> dict[str, Any]:
    """Return the state after some batches, after a round trip through JSON."""
    with opened(dataset, **options) as batches:
        for _ in range(steps):
            next(batches)
        state: dict[str, Any] = json.loads(json.dumps(batches.state_dict()))
        return state


def opened(dataset: Dataset, **options: Any) -> DistributedIterator:
    return iter(DistributedDataset(dataset, 1, options=InputOptions(**options)))


@pytest.mark.parametrize("other", [
    {"image": X}, {"x": X, "y": X}, {"x": X.astype("f4")}, {"x": X[:, None]}, {"x": X > 3},
    {"x": X.astype(str)}, X, (X,), [X], {"x": (X,)},
])  # fmt: skip
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_arrays_with_other_columns_are_refused_at_once(other: Any, steps: int) -> None:
    state = begun(Dataset.from_arrays({"x": X}).batch(4), steps)
    with opened(Dataset.from_arrays(other).batch(4)) as batches:
        before = batches.state_dict()
        with pytest.raises(DatasetError, match=r"row\['x'\]: float64"):
            batches.load_state_dict(state)
        assert batches.state_dict() == before
        next(batches)
    with opened(Dataset.from_arrays({"x": X * 2}).batch(4)) as batches:
        batches.load_state_dict(state)


SOURCES: dict[str, Callable[[list[Any]], Dataset]] = {
    "sequence": Dataset.from_sequence,
    "iterable": lambda rows: Dataset.from_iterable(lambda: iter(rows)),
    "files": lambda rows: Dataset.from_files([__file__], lambda path: iter(rows)),
    "indexed files": lambda rows: Dataset.from_files(
        [__file__], lambda path: rows, random_access=True
    ),
    "map": lambda rows: Dataset.range(20).map(lambda k: rows[int(k)]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_elements_of_another_kind_are_refused_before_any_is_delivered(name: str) -> None:
    saved = SOURCES[name]([{"x": k} for k in range(20)]).batch(4)
    state = begun(saved, 2)
    others: list[Callable[[int], Any]] = [
        lambda k: {"image": k}, lambda k: k, lambda k: {"x": str(k)}, lambda k: {"x": k, "y": k}
    ]  # fmt: skip
    for other in others:
        rows = [other(k) for k in range(20)]
        with opened(SOURCES[name](rows).batch(4)) as batches:
            batches.load_state_dict(state)
            for _ in range(2):  # a second try is refused too
                with pytest.raises(DatasetError, match=r"element\['x'\]: numbers and is"):
                    next(batches)
            assert batches.state_dict() == state
    with opened(SOURCES[name]([{"x": -0.5} for k in range(20)]).batch(4)) as batches:
        next(batches)
        batches.load_state_dict(state)  # another numeric dtype is accepted
        assert len(list(batches)) == 3


def test_elements_that_were_seen_are_compared_at_once() -> None:
    state = begun(SOURCES["sequence"]([{"x": k} for k in range(20)]).batch(4), 2)
    with opened(SOURCES["sequence"](list(range(20))).batch(4)) as batches:
        next(batches)
        before = batches.state_dict()
        with pytest.raises(DatasetError, match="load_state_dict"):
            batches.load_state_dict(state)
        assert batches.state_dict() == before
        next(batches)


@pytest.mark.parametrize("name", SOURCES)
def test_other_values_are_refused_where_fingerprints_are_taken(name: str) -> None:
    if name in ("files", "indexed files", "map"):
        pytest.skip("the fingerprint is that of the files, and of what is mapped")
    rows = [{"x": k} for k in range(20)]
    other = [{"x": 19 - k} for k in range(20)]
    state = begun(SOURCES[name](rows).batch(4), 2, fingerprint=True)
    for fingerprint, refused in ((True, True), (False, False)):
        with opened(SOURCES[name](other).batch(4), fingerprint=fingerprint) as batches:
            if refused:
                with pytest.raises(DatasetError, match="fingerprint was"):
                    batches.load_state_dict(state)
            else:
                batches.load_state_dict(state)
    with opened(SOURCES[name](rows).batch(4), fingerprint=True) as batches:
        batches.load_state_dict(state)
        batches.load_state_dict(begun(SOURCES[name](other).batch(4), 2))  # no fingerprint
        assert len(list(batches)) == 3


@pytest.mark.parametrize("key", ["element", "fingerprint"])
@pytest.mark.parametrize("value", [3, [], {}, True])
def test_damaged_descriptions_are_refused(key: str, value: Any) -> None:
    data = Dataset.range(9).batch(3)
    with opened(data) as batches, pytest.raises(DatasetError, match="damaged"):
        batches.load_state_dict({**begun(data, 1), key: value})


def test_states_without_element_and_fingerprint_are_still_read() -> None:
    data = Dataset.range(9).batch(3)
    state = begun(data, 1)
    del state["element"]
    with opened(data) as batches:
        batches.load_state_dict(state)
        assert len(list(batches)) == 2


ENDS: dict[str, Callable[[int | None], Dataset]] = {
    "last": lambda count: Dataset.range(10).shuffle(seed=1).batch(4).repeat(count),
    "map behind": lambda count: Dataset.range(10).batch(4).repeat(count).map(lambda x: x + 1),
    "sequential": lambda count: Dataset.from_iterable(lambda: iter(range(10)))
    .filter(lambda x: x != 3).batch(4).repeat(count),
    "prefetch behind": lambda count: Dataset.range(10).batch(4).repeat(count).prefetch(1),
    "full batches behind": lambda count: Dataset.range(12).shuffle(seed=2).repeat(count).batch(4),
    "batch behind, remainder left out": lambda count: Dataset.range(10).repeat(count)
    .batch(4, drop_remainder=True),
}  # fmt: skip


@pytest.mark.parametrize("longer", [3, 7, None])
@pytest.mark.parametrize("name", ENDS)
def test_a_run_continues_with_more_repetitions_from_every_position(
    name: str, longer: int | None
) -> None:
    short, long = ENDS[name](2), ENDS[name](longer)
    num_steps = len(list(short))
    for steps in range(num_steps + 1):
        with opened(long) as whole, opened(long) as resumed:
            for _ in range(steps):
                next(whole)
            resumed.load_state_dict(begun(short, steps))
            for _ in range(4):
                got, wanted = next(resumed, None), next(whole, None)
                assert (got is None) == (wanted is None)
                if got is not None and wanted is not None:
                    np.testing.assert_array_equal(got.values[0], wanted.values[0])


SHORT = 2
UNLIKE: dict[str, tuple[Callable[[int | None], Dataset], int | None, int, int]] = {
    # dataset by count, the new count, epoch, steps
    "fewer": (ENDS["last"], 1, 0, 1),
    "a later epoch": (ENDS["last"], 3, 1, 1),
    "behind a short batch": (lambda n: Dataset.range(10).repeat(n).batch(8), 3, 0, 3),
    "a shuffle behind": (lambda n: Dataset.range(10).repeat(n).shuffle(seed=1).batch(4), 3, 0, 1),
    "a filter behind": (lambda n: Dataset.range(10).repeat(n).filter(bool).batch(4), 3, 0, 1),
    "unknown length": (
        lambda n: Dataset.range(10).filter(bool).repeat(n).batch(4), 3, 0, 1
    ),
    "inside": (lambda n: Dataset.range(10).repeat(n).batch(4).repeat(2), 3, 0, 1),
    "take behind": (lambda n: Dataset.range(10).repeat(n).take(15).batch(4), 3, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_other_counts_are_refused(name: str) -> None:
    make, count, epoch, steps = UNLIKE[name]
    state = {**begun(make(SHORT), steps), "epoch": epoch}
    with opened(make(count)) as batches:
        with pytest.raises(DatasetError, match=r"was repeat\(2\).*may grow"):
            batches.load_state_dict(state)
        next(batches)
