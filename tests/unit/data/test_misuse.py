"""Misuse is refused at the call that is wrong, with an error of this library."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.data.dataset import Dataset
from dvkernels.errors import DatasetError


async def later(x: Any) -> Any:
    return x


async def stream(*_: Any) -> AsyncIterator[Any]:
    yield 1


def yielding(x: Any) -> Iterator[Any]:
    yield x


class Asynchronous:
    async def __call__(self, x: Any) -> Any:
        return x


class Yielding:
    def __call__(self, x: Any) -> Iterator[Any]:
        yield x


class Length:
    def __init__(self, length: Any) -> None:
        self._length = length

    def __len__(self) -> Any:
        return self._length

    def __getitem__(self, k: int) -> int:
        return k


THREE = Dataset.range(3)
MASKED = np.ma.array([[1.0, -9.0], [2.0, 3.0]], mask=[[0, 1], [0, 0]])
ASYNC = {
    "a coroutine": later,
    "a stream": stream,
    "a partial": functools.partial(later, 1),
    "an object": Asynchronous(),
}
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    **{f"map of {k}": (lambda fn=fn: THREE.map(fn), "without async") for k, fn in ASYNC.items()},
    **{
        f"filter of {k}": (lambda fn=fn: THREE.filter(fn), "without async")
        for k, fn in ASYNC.items()
    },
    "iterable of a coroutine": (lambda: Dataset.from_iterable(later, epoch=True), "without async"),
    "stateful stream": (lambda: Dataset.from_iterable(stream, stateful=True), "without async"),
    "reader": (lambda: Dataset.from_files([__file__], stream), "without async"),
    "map of a generator function": (lambda: THREE.map(yielding), "return instead of yield"),
    "filter of one": (lambda: THREE.filter(Yielding()), "return instead of yield"),
    "set of paths": (lambda: Dataset.from_files({__file__}, print), "order"),
    "frozen set": (lambda: list(Dataset.from_iterable(lambda: frozenset("ab"))), "order"),
    "stateful flag": (lambda: Dataset.from_iterable(list, stateful=1), "True or False"),  # type: ignore[arg-type]
    "access flag": (
        lambda: Dataset.from_files([__file__], list, random_access="yes"),  # type: ignore[arg-type]
        "True or False",
    ),
    "fingerprint": (lambda: dv.InputOptions(fingerprint="no"), "True or False"),  # type: ignore[arg-type]
    "to device": (lambda: dv.InputOptions(prefetch_to_device=2), "True or False"),  # type: ignore[arg-type]
    **{
        f"length {length!r}": (
            lambda length=length: Dataset.from_sequence(Length(length)),
            "length",
        )
        for length in (-1, 2.5, True, None, "3", float("nan"), 2**64)
    },
    "length of a file": (
        lambda: Dataset.from_files([__file__], lambda path: Length(-2), random_access=True),
        "length",
    ),
    "context": (lambda: dv.InputContext(0), "num_input_pipelines"),
    "context id": (lambda: dv.InputContext(2, 2), "input_pipeline_id"),
    "context replicas": (lambda: dv.InputContext(1, 0, True), "num_replicas_in_sync"),
    "context epoch": (lambda: dv.InputContext(1, 0, 1, -1), "epoch"),
    "masked rows": (lambda: Dataset.from_arrays({"x": MASKED}), r"nest\['x'\].*mask"),
    "masked": (lambda: Dataset.from_arrays(np.ma.masked), "mask"),
    "masked elements": (lambda: list(Dataset.from_sequence([*MASKED])), "mask"),
    "masked in a batch": (lambda: list(Dataset.from_sequence([(*MASKED,)] * 2).batch(2)), "mask"),
    "masked by a function": (
        lambda: list(THREE.batch(2).map(lambda x: np.ma.array(x, mask=True))),
        "mask",
    ),
    "masked by a worker": (
        lambda: list(THREE.map(lambda x: np.ma.array([x], mask=True), num_workers=2).batch(2)),
        "mask",
    ),
    "masked in a window": (
        lambda: list(Dataset.from_iterable(lambda: iter(MASKED)).shuffle(seed=1, window=2)),
        "mask",
    ),
    "masked ahead": (lambda: list(Dataset.from_iterable(lambda: iter(MASKED)).prefetch(1)), "mask"),
    "masked side": (lambda: list(THREE.zip(Dataset.from_sequence([*MASKED]))), "mask"),
    "masked arrival": (
        lambda: next(iter(Dataset.from_live(lambda timeout: MASKED, batch_size=1))),
        "mask",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_misuse_that_would_fail_silently_or_later_is_refused(name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises(DatasetError, match=words):
        call()


@pytest.mark.parametrize("paths", [[__file__], {__file__: 1}.keys(), (x for x in [__file__])])
def test_any_ordered_iterable_may_hold_the_paths(paths: Any) -> None:
    assert Dataset.from_files(paths, lambda path: [1]).files == (__file__,)


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


@pytest.mark.parametrize("call", [
    lambda: THREE.batch(Hostile()), lambda: THREE.map(Hostile()), lambda: THREE.zip(Hostile()),
    lambda: Dataset.from_files([Hostile()], list), lambda: Dataset.from_source(Hostile()),
    lambda: Dataset.from_live(Hostile()), lambda: Dataset.from_arrays((Hostile(),)),
    lambda: list(Dataset.from_sequence([Hostile()]).batch(1)),
    lambda: list(Dataset.from_iterable(Hostile)), lambda: dv.InputOptions(on_error=Hostile()),
    lambda: iter(dv.DistributedDataset(Dataset.from_sequence([Hostile()]), 1)).__next__(),
])  # fmt: skip
def test_objects_whose_repr_raises_are_refused_too(call: Callable[[], Any]) -> None:
    with pytest.raises(DatasetError, match="a Hostile"):
        call()
