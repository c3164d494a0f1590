"""Workers whose data differ all raise the same error before the first step."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import InputOptions
from dvkernels.errors import DatasetError

SIZE = 3
ODD = 1  # the worker that differs
POLICIES = ["auto", "data", "off"]


class AllGather:
    """All-gather between threads that stand for workers; counts the rounds."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(SIZE, timeout=20)
        self._messages: list[Any] = [None] * SIZE
        self.count = 0

    def of(self, worker: int) -> Callable[[Any], list[Any]]:
        def exchange(message: Any) -> list[Any]:
            self._messages[worker] = message
            self._barrier.wait()
            messages = list(self._messages)
            if self._barrier.wait() == 0:
                self.count += 1
            return messages

        return exchange


def run_workers(
    work: Callable[[int, Callable[[Any], list[Any]]], Any],
) -> tuple[list[Any], AllGather]:
    """Return the result or error of each worker, and the exchange."""
    all_gather = AllGather()

    def outcome(worker: int) -> Any:
        try:
            return work(worker, all_gather.of(worker))
        except Exception as error:
            return error

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(outcome, range(SIZE))), all_gather


def distributed_for(
    dataset: Dataset, worker: int, exchange: Any, **options: Any
) -> DistributedDataset:
    return DistributedDataset(
        dataset, 1, share=WorkerShare([1] * SIZE, worker), exchange=exchange,
        options=InputOptions(**options),
    )  # fmt: skip


def first_steps(make: Callable[[int], Dataset], **options: Any) -> list[Any]:
    """Return the first batch of each worker, or its error."""

    def work(worker: int, exchange: Any) -> Any:
        with iter(distributed_for(make(worker), worker, exchange, **options)) as batches:
            return next(batches)

    return run_workers(work)[0]


def check_refused(found: list[Any], *messages: str) -> None:
    assert [type(one) for one in found] == [DatasetError] * SIZE, found
    assert len({str(one) for one in found}) == 1
    for message in messages:
        assert message in str(found[0])


ROWS = np.arange(12)
DIFFERENCES: dict[str, tuple[Callable[[bool], Dataset], tuple[str, ...]]] = {
    "seed": (
        lambda odd: Dataset.range(12).shuffle(seed=int(odd)),
        ("link 1", "shuffle(seed=0) on workers 0 and 2, shuffle(seed=1) on worker 1"),
    ),
    "window": (lambda odd: Dataset.range(12).shuffle(seed=1, window=3 + odd), ("window=4)",)),
    "length": (lambda odd: Dataset.range(12 - odd), ("range(12) on workers 0 and 2",)),
    "rows": (lambda odd: Dataset.from_arrays(ROWS[odd:]), ("length=11", "on worker 1")),
    "columns": (lambda odd: Dataset.from_arrays({"ab"[odd]: ROWS}), ("row['b']", "row['a']")),
    "dtype": (lambda odd: Dataset.from_arrays(ROWS * (1.5 if odd else 1)), ("float64", "int64")),
    "length of a sequence": (lambda odd: Dataset.from_sequence([*ROWS[odd:]]), ("length=11",)),
    "a transform more": (
        lambda odd: Dataset.range(13).skip(1) if odd else Dataset.range(13), ("skip(1)",)
    ),
    "a function": (lambda odd: Dataset.range(12).map(str if odd else int), ("map(str)",)),
    "take": (lambda odd: Dataset.range(12).take(11 + odd), ("take(12) on worker 1",)),
    "order of files": (
        lambda odd: Dataset.from_files(FILES[:: -1 if odd else 1], np.load, random_access=True),
        ("names=", "sort the paths"),
    ),
    "list of files": (lambda odd: Dataset.from_files(FILES[odd:], np.load), ("count=2", "count=3")),
    "another side": (lambda odd: Dataset.range(12).zip(Dataset.range(12 + odd)), ("range(13)",)),
}  # fmt: skip
FILES: list[str] = []


@pytest.fixture(autouse=True)
def files(tmp_path: pathlib.Path) -> Iterator[None]:
    FILES[:] = [str(tmp_path / f"{k}.npy") for k in range(3)]
    for k, name in enumerate(FILES):
        np.save(name, np.arange(4 * k, 4 * k + 4))
    yield
    FILES.clear()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_pipelines_that_differ_are_refused_by_all(name: str, policy: str) -> None:
    make, messages = DIFFERENCES[name]
    found = first_steps(lambda worker: make(worker == ODD).batch(3), auto_shard_policy=policy)
    check_refused(found, "dataset", *messages)


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_sizes_that_differ_are_refused_by_all(policy: str) -> None:
    found = first_steps(
        lambda worker: Dataset.range(12).batch(6 if worker == ODD else 3), auto_shard_policy=policy
    )
    check_refused(found, "batch(3) on workers 0 and 2, batch(6) on worker 1")


def test_files_that_differ_are_refused_where_each_reads_its_own() -> None:
    def read(path: str) -> Any:
        return iter(np.load(path))

    found = first_steps(
        lambda worker: Dataset.from_files(FILES[:: -1 if worker == ODD else 1], read).batch(3),
        auto_shard_policy="file",
    )
    check_refused(found, "sort the paths")


@pytest.mark.parametrize("policy", [*POLICIES, "file"])
@pytest.mark.parametrize("which", ["epoch", "position", "state of another epoch"])
def test_positions_that_differ_are_refused_by_all_and_no_step_is_taken(
    which: str, policy: str
) -> None:
    dataset = Dataset.from_files(FILES, lambda path: iter(np.load(path))).batch(3)

    def work(worker: int, exchange: Any) -> Any:
        distributed = distributed_for(dataset, worker, exchange, auto_shard_policy=policy)
        if which == "epoch" and worker == ODD:
            distributed.set_epoch(7)
        batches = iter(distributed)
        if which != "epoch":
            next(batches)
            state = batches.state_dict()
            odd = {"position": 2, "epoch": 0} if which == "position" else {"epoch": 7}
            if "lanes" in state and which == "position":
                odd["lanes"] = [2, 1, 1]
                odd["position"] = 3
            batches.load_state_dict({**state, **(odd if worker == ODD else {})})
        before = batches.state_dict()
        with pytest.raises(DatasetError) as raised:
            next(batches)
        assert batches.state_dict() == before
        batches.load_state_dict(dict(before, epoch=5, position=0) if "lanes" not in before else
                                dict(before, epoch=5, position=0, lanes=[0] * SIZE))  # fmt: skip
        next(batches)  # they agree again
        return raised.value

    check_refused(
        run_workers(work)[0], "position" if which == "position" else "7 on worker 1", "worker 1"
    )


def test_a_worker_that_alone_loads_a_state_is_named() -> None:
    dataset = Dataset.from_files(FILES, lambda path: iter(np.load(path))).batch(3)

    def work(worker: int, exchange: Any) -> Any:
        batches = iter(distributed_for(dataset, worker, exchange, auto_shard_policy="file"))
        next(batches)
        if worker == ODD:
            batches.load_state_dict(batches.state_dict())
        return next(batches)

    check_refused(run_workers(work)[0], "worker 1 begins an iterator, or has loaded a state")


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_exchange_reports_once_per_iterator_and_once_per_load(policy: str) -> None:
    def work(worker: int, exchange: Any) -> Any:
        distributed = distributed_for(
            Dataset.range(30).shuffle(seed=1).batch(3), worker, exchange, auto_shard_policy=policy
        )
        seen = [list(distributed), list(distributed)]
        batches = iter(distributed)
        batches.load_state_dict(batches.state_dict())
        seen.append(list(batches))
        assert next(batches, None) is None  # at the end no worker waits for another
        return seen

    found, all_gather = run_workers(work)
    assert not isinstance(found[0], Exception), found
    assert all_gather.count == 3


def test_at_the_end_no_worker_waits_for_another() -> None:
    dataset = Dataset.from_files(FILES, lambda path: iter(np.load(path))).batch(3)

    def work(worker: int, exchange: Any) -> Any:
        batches = iter(distributed_for(dataset, worker, exchange, auto_shard_policy="file"))
        assert len(list(batches)) == 4
        return worker != ODD or next(batches, "ended")

    assert run_workers(work)[0] == [True, "ended", True]


DATA: dict[str, Callable[[bool], Dataset]] = {
    "order of a sequence": lambda odd: Dataset.from_sequence([*ROWS[:: -1 if odd else 1]]),
    "one number": lambda odd: Dataset.from_arrays(np.where(ROWS == 7, ROWS + odd, ROWS)),
    "order of rows": lambda odd: Dataset.from_arrays(ROWS[:: -1 if odd else 1]),
    "text": lambda odd: Dataset.from_sequence(["a", "bc"[odd], "d", "e", "f", "g"]),
    "nests": lambda odd: Dataset.from_sequence([{"x": k, "y": (k, k * odd)} for k in range(6)]),
    "what is yielded": lambda odd: Dataset.from_iterable(lambda: iter(ROWS + odd)),
    "behind a shuffle": lambda odd: Dataset.from_sequence([*(ROWS + odd)]).shuffle(seed=1),
    "one side": lambda odd: Dataset.range(12).zip(Dataset.from_arrays(ROWS + odd)),
    "bytes of a file": lambda odd: Dataset.from_files(
        [FILES[2 * odd]], np.load, random_access=True
    ).map(lambda x: x),
    "an element that cannot be read": lambda odd: Dataset.from_sequence(Broken(odd)),
}


class Broken:
    def __init__(self, is_broken: bool) -> None:
        self._is_broken = is_broken

    def __len__(self) -> int:
        return 12

    def __getitem__(self, k: int) -> int:
        if self._is_broken and k == 11:
            raise OSError("a bad disk")
        return k


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DATA)
def test_data_that_differ_are_refused_by_all_where_fingerprints_are_taken(
    name: str, policy: str, tmp_path: pathlib.Path
) -> None:
    twin = tmp_path / "other" / "0.npy"
    twin.parent.mkdir(exist_ok=True)
    np.save(twin, np.arange(4) + 1)
    FILES[2] = str(twin)

    def make(worker: int) -> Dataset:
        return DATA[name](worker == ODD).batch(3)

    options = {"auto_shard_policy": policy, "fingerprint": True}
    check_refused(first_steps(make, **options), "fingerprint", "the data differ")
    assert not any(
        isinstance(one, DatasetError) for one in first_steps(lambda worker: make(0), **options)
    )


def test_a_fingerprint_is_taken_once_and_reads_a_bounded_part() -> None:
    class Counting:
        def __init__(self, length: int) -> None:
            self.length, self.read = length, set[int]()

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, k: int) -> int:
            self.read.add(k)
            return k

    from dvkernels.data.fingerprint import fingerprint

    for length in (0, 1, 2, 4096, 4097, 10**6):
        source = Counting(length)
        data = Dataset.from_sequence(source).shuffle(seed=1).batch(2)
        taken = fingerprint(data.node)
        assert len(source.read) == min(length, 4096)
        assert {0, length - 1} - {-1} <= source.read or length == 0
        source.read.clear()
        assert fingerprint(data.node) == taken
        assert not source.read
    several = np.arange(2**22).reshape(-1, 4)  # larger than one hashed chunk
    whole = [
        fingerprint(Dataset.from_arrays(array).node) for array in (several, several[:, :].copy("F"))
    ]
    assert whole[0] == whole[1]


def test_fingerprints_of_files_use_size_and_blocks(tmp_path: pathlib.Path) -> None:
    from dvkernels.data.fingerprint import fingerprint

    path = tmp_path / "data"
    found = set()
    contents = [b"", b"\1", bytes(4096), bytes(4097), bytes(10**6), b"\1" + bytes(10**6 - 1),
                bytes(10**6 - 1) + b"\1", bytes(10**6 + 1)]  # fmt: skip
    for content in contents:
        path.write_bytes(content)
        found.add(fingerprint(Dataset.from_files([path], lambda path: []).node))
    assert len(found) == len(contents)
    path.unlink()
    path.mkdir()
    for name in "ab":
        (path / name).write_text(name)
        found.add(fingerprint(Dataset.from_files([path], lambda path: []).node))
    assert len(found) == len(contents) + 2


def test_datasets_made_per_worker_may_differ_but_not_their_epochs() -> None:
    def work(worker: int, exchange: Any, epoch: int = 0) -> Any:
        distributed = DistributedDataset(
            Dataset.range(4 + worker).batch(1 + worker), 1, share=WorkerShare([1] * SIZE, worker),
            exchange=exchange, is_dealt=True,
        )  # fmt: skip
        distributed.set_epoch(epoch * worker)
        return len(list(distributed))

    assert len(set(run_workers(work)[0])) == 1
    check_refused(
        run_workers(lambda worker, exchange: work(worker, exchange, 1))[0], "epoch is 0 on worker 0"
    )
