"""Sources and functions that reuse their memory do not change elements that were pulled before."""

from __future__ import annotations

import array
import dataclasses
import pathlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optree
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.values.distributed import PerReplica

COUNT = 7


@dataclasses.dataclass
class Plain:
    """A class that is not a pytree node: optree treats it as a leaf."""

    image: Any


class Frames:
    """A source whose elements share one buffer, which holds the latest element."""

    def __init__(self, form: str) -> None:
        self._buffer = np.zeros(3)
        self._bytes = bytearray(3)
        self._records = np.zeros(1, [("x", float), ("n", int)])
        self._form = form

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, k: int) -> Any:
        self._buffer[:] = k
        self._bytes[:] = bytes([k]) * 3
        self._records[0] = (k, k)
        return FORMS[self._form](self)

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(COUNT))


FORMS: dict[str, Callable[[Frames], Any]] = {
    "array": lambda self: self._buffer,
    "view": lambda self: self._buffer[::2],
    "read-only view": lambda self: np.broadcast_to(self._buffer[:1], 2),
    "structured scalar": lambda self: self._records[0],
    "structured array": lambda self: self._records,
    "memoryview": lambda self: memoryview(self._buffer),
    "bytearray": lambda self: self._bytes,
    "tuple": lambda self: (self._buffer, 3),
    "dict": lambda self: {"a": self._buffer, "b": [self._buffer[:1]]},
    "plain dataclass": lambda self: Plain(self._buffer),
    "tensor": lambda self: pytest.importorskip("torch").from_numpy(self._buffer),
}


def from_source(form: str) -> Dataset:
    class Source:
        def open(self, epoch: int, state: Any) -> Any:
            frames = Frames(form)

            class Reader:
                at = 0

                def __next__(self) -> Any:
                    if self.at == COUNT:
                        raise StopIteration
                    self.at += 1
                    return frames[self.at - 1]

                def state(self) -> int:
                    return self.at

            return Reader()

    return Dataset.from_source(Source())


def mapped(form: str, **how: Any) -> Dataset:
    frames = Frames(form)
    return Dataset.range(COUNT).map(lambda k: frames[int(k)], **how)


SOURCES: dict[str, Callable[[str], Dataset]] = {
    "iterable": lambda form: Dataset.from_iterable(lambda: iter(Frames(form))),
    "sequence": lambda form: Dataset.from_sequence(Frames(form)),
    "files": lambda form: Dataset.from_files([__file__], lambda path: iter(Frames(form))),
    "indexed files": lambda form: Dataset.from_files(
        [__file__], lambda path: Frames(form), random_access=True
    ),
    "source": from_source,
    "map": mapped,
    "map after filter": lambda form: mapped_after_filter(form),
    "map by a thread": lambda form: mapped(form, num_workers=1),
    "filter": lambda form: Dataset.from_sequence(Frames(form)).filter(lambda x: True),
    "zip": lambda form: zipped(form),
}


def mapped_after_filter(form: str) -> Dataset:
    frames = Frames(form)
    some = Dataset.range(COUNT).filter(lambda k: True)
    return some.map(lambda k: frames[int(k)], num_workers=1)


def zipped(form: str) -> Dataset:
    frames = Frames(form)  # both sources share the buffer
    sides = Dataset.from_sequence(frames), Dataset.from_sequence(frames).skip(0)
    return sides[0].zip(sides[1]).map(lambda pair: pair[0])


USES: dict[str, Callable[[Dataset], Dataset]] = {
    "as it is": lambda data: data,
    "prefetch": lambda data: data.prefetch(3),
    "window": lambda data: data.shuffle(seed=3, window=4),
    "repeat and shard": lambda data: data.repeat(2).shard(2, 0),
    "worker": lambda data: data.map(lambda x: x, num_workers=2),
}


def numbers(element: Any) -> list[float]:
    """Return the values in every part of an element."""
    found: list[float] = []
    for leaf in optree.tree_leaves(element):
        leaf = leaf.image if isinstance(leaf, Plain) else leaf
        if isinstance(leaf, int):
            continue
        held = np.asarray(leaf)
        if held.dtype.names:
            held = held["x"]
        found += np.unique(held).tolist()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("use", USES)
def test_pulled_elements_do_not_change(source: str, use: str, form: str) -> None:
    dataset = USES[use](SOURCES[source](form))
    held = list(dataset)
    seen = sorted(value for element in held for value in set(numbers(element)))
    wanted = [*range(0, COUNT, 2), *range(1, COUNT, 2)] if "repeat" in use else range(COUNT)
    assert seen == sorted(wanted)
    assert all(len(set(numbers(element))) == 1 for element in held)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("plain dataclass",)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("use", ["as it is", "prefetch", "window", "worker"])
def test_rows_of_batches_do_not_change(source: str, use: str, form: str) -> None:
    held = list(USES[use](SOURCES[source](form)).batch(3))
    first = optree.tree_map(lambda *parts: np.concatenate(parts), held[0], *held[1:])
    rows = [optree.tree_map(lambda leaf, k=k: leaf[k], first) for k in range(COUNT)]
    values = sorted(value for row in rows for value in set(numbers(row)))
    assert values == ([0, 1, 2, *[3] * COUNT, 4, 5, 6] if form == "tuple" else [*range(COUNT)])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("is_dealt", [False, True])
def test_parts_of_replicas_do_not_change(prefetch: int, is_dealt: bool) -> None:
    def batches() -> Iterator[Any]:
        for frame in Frames("array"):
            yield frame[None]

    distributed = DistributedDataset(
        Dataset.from_iterable(batches).take(6),
        2,
        options=InputOptions(prefetch=prefetch),
        is_dealt=is_dealt,
    )
    held: list[PerReplica[Any]] = list(distributed)
    assert [float(x) for parts in held for part in parts.values for x in part[:, 0]] == [*range(6)]


def test_elements_of_live_sources_do_not_change() -> None:
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    frames = Frames("array")

    def get(timeout: float) -> Any:
        return frames[arrived.get(timeout=timeout)]

    for k in range(COUNT):
        arrived.put(k)
    batch = next(iter(Dataset.from_live(get, batch_size=COUNT)))
    assert batch[:, 0].tolist() == list(range(COUNT))
    for k in range(COUNT):
        arrived.put(k)
    singles = list(Dataset.from_live(get).take(COUNT))
    assert [row[0] for row in singles] == list(range(COUNT))


def test_elements_of_file_shards_do_not_change(tmp_path: pathlib.Path) -> None:
    from dvkernels.data.distributed.worker_shards import FileShards

    lane = SOURCES["iterable"]("array").node
    lanes = Dataset(FileShards([lane, lane], [0, 0], 4, drops_remainder=False))
    rows = np.concatenate(list(lanes))[:, 0]
    assert rows.tolist() == [*range(COUNT), *range(COUNT)]


def test_other_buffers_are_copied_and_immutable_values_are_not() -> None:
    numbers = array.array("d", [1.0])
    text = "a long text" * 3
    ((held, same),) = Dataset.from_iterable(lambda: [(numbers, text)])
    numbers[0] = 2.0
    assert held[0] == 1.0
    assert same is text


def test_rows_of_arrays_are_views_and_no_copies() -> None:
    rows = np.arange(6.0)
    batch = next(iter(Dataset.from_arrays(rows).batch(3)))
    assert np.shares_memory(batch, rows)
