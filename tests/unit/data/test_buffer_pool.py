"""A batch stays as it was while anybody refers to it; then its memory holds a later batch."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.data import sources, stacking
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset

ROWS = np.arange(600.0).reshape(100, 6)


@pytest.fixture(autouse=True)
def _every_batch_is_large(monkeypatch):
    monkeypatch.setattr(sources, "_SHARED_NBYTES", 1)
    monkeypatch.setattr(stacking, "_LARGE_NBYTES", 1)


def shuffled(rows=ROWS):
    return Dataset.from_arrays(rows).shuffle(seed=0)


# What takes memory: batches of shuffled rows, and batches stacked from elements.
MAKE = {
    "taken": shuffled,
    "stacked": lambda: shuffled().map(np.copy),
    "stacked in order": lambda: Dataset.from_iterable(lambda: iter(ROWS)),
}


def address(array):
    return array.__array_interface__["data"][0]


def read(kept):
    return np.array(np.asarray(kept))


def memory_of(batches, leaf):
    """Return the addresses of the memory of batches, each of which is a view of it."""
    return {address(leaf(batch).base) for batch in batches}


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("make", MAKE)
def test_memory_is_used_again_once_a_batch_is_dropped(make, depth):
    data = MAKE[make]().batch(8)
    memory = memory_of(data.prefetch(depth), lambda batch: batch)
    assert len(memory) <= 3 + depth
    np.testing.assert_array_equal(np.sort(np.concatenate([*data]), axis=0), ROWS)


def test_all_columns_of_distributed_batches_use_memory_again():
    distributed = DistributedDataset(shuffled((ROWS, ROWS[:, 0])).batch(8), num_replicas=3)
    for k in range(2):
        epochs = (batch for _ in range(3) for batch in distributed)
        assert len(memory_of(epochs, lambda batch: batch[k].values[0])) <= 3  # noqa: B023


HOLDERS = {
    "batch": lambda batch: batch,
    "slice": lambda batch: batch[2:, ::-2],
    "slice of a slice": lambda batch: batch[1:][1:].T,
    "reshaped": lambda batch: batch.reshape(-1, 2),
    "other dtype": lambda batch: batch.view(np.uint8),
    "class": lambda batch: batch.view(np.recarray),
    "masked": lambda batch: np.ma.masked_array(batch),
    "strided": lambda batch: np.lib.stride_tricks.as_strided(batch, (3,), (8,)),
    "base": lambda batch: batch.base,
    "view of the base": lambda batch: batch.base[1:],
    "memoryview": lambda batch: memoryview(batch),
    "buffer": lambda batch: np.frombuffer(memoryview(batch).cast("B"), np.uint8),
    "iterator": lambda batch: batch.flat,
    "row": lambda batch: [*batch][3],
    "DLPack": lambda batch: np.from_dlpack(batch),
    "capsule": lambda batch: (batch[3:].__dlpack__(), batch.copy())[1],
    "read-only": lambda batch: (batch.setflags(write=False), batch)[1],
    "torch": lambda batch: pytest.importorskip("torch").from_numpy(batch),
    "jax": lambda batch: pytest.importorskip("jax").dlpack.from_dlpack(batch),
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "deep copy": lambda batch: copy.deepcopy(batch),
    "cycle": lambda batch: cyclic(batch[1:])[0],
}


def cyclic(value):
    held = [value]
    held.append(held)
    return held


SLOW_IMPORTS = {"torch": pytest.mark.wide, "jax": pytest.mark.jax}


@pytest.mark.parametrize(
    "holder", [pytest.param(name, marks=SLOW_IMPORTS.get(name, ())) for name in HOLDERS]
)
@pytest.mark.parametrize("make", MAKE)
def test_what_a_holder_of_a_batch_reads_never_changes(make, holder):
    held = []
    for batch in MAKE[make]().batch(8).repeat(2):
        kept = HOLDERS[holder](batch)
        held.append((kept, read(kept)))
        del batch, kept
        for kept, before in held:
            np.testing.assert_array_equal(read(kept), before)
        if len(held) > 5:
            del held[::2]


def test_a_capsule_that_nobody_has_opened_holds_its_batch():
    data = iter(shuffled().batch(8).repeat(3))
    capsule, at = (lambda batch: (batch.__dlpack__(), address(batch)))(next(data))
    assert at not in [address(batch) for batch in data]
    del capsule


def test_writing_to_a_batch_reaches_neither_the_source_nor_another_batch():
    rows = ROWS.copy()
    expected = [batch.copy() for batch in shuffled(rows).batch(8)]
    previous = None
    for batch, wanted in zip(shuffled(rows).batch(8), expected, strict=True):
        np.testing.assert_array_equal(batch, wanted)
        batch[:] = -1
        with pytest.raises(ValueError, match="own"):
            batch.resize(3)
        assert previous is None or (previous == -1).all()
        previous = batch
    np.testing.assert_array_equal(rows, ROWS)


def test_slices_of_the_source_are_views_that_cannot_be_written():
    batch = next(iter(Dataset.from_arrays(ROWS).skip(3).batch(8)))
    assert np.shares_memory(batch, ROWS)
    assert not batch.flags.writeable


def test_threads_that_keep_some_batches_of_one_dataset_read_what_they_got():
    data, wrong = shuffled().batch(8), []
    expected = [batch.copy() for batch in data]

    def use(stride):
        for _ in range(20):
            kept = [*itertools.islice(data, stride % 4, None, stride)]
            wanted = expected[stride % 4 :: stride]
            wrong.extend(k for k, w in zip(kept, wanted, strict=True) if not (k == w).all())

    threads = [threading.Thread(target=use, args=(1 + k,)) for k in range(5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_and_its_parent_both_go_on():
    iterator = iter(shuffled().batch(8).repeat(3))
    held = [next(iterator) for _ in range(3)]
    before = np.array(held)
    child = os.fork()
    if child == 0:
        held.pop()
        is_right = len([*iterator]) == 36 and (np.array(held) == before[:2]).all()
        os._exit(0 if is_right else 1)
    assert len([*iterator]) == 36
    np.testing.assert_array_equal(np.array(held), before)
    assert os.waitpid(child, 0)[1] == 0


def unused():
    return dv.profiler.memory().by_device.get("cpu:0", {}).get("batches", 0)


def test_the_memory_report_counts_unused_memory_until_the_dataset_is_dropped():
    before, (rows,) = unused(), [np.zeros((100, 1000))]
    data = shuffled(rows).batch(10)
    batches = [*data]
    assert unused() == before
    first = weakref.ref(batches[0])
    del batches
    assert first() is None
    assert 3 * 80_000 <= unused() - before <= 10 * 80_000
    assert "batches" in str(dv.profiler.memory())
    assert next(iter(data)).shape == (10, 1000)
    del data
    assert unused() == before


def test_a_pool_remembers_few_arrays_however_many_batches_are_held():
    data = shuffled(np.zeros((400, 1000))).batch(4)
    batches = [*data]
    before = unused()
    del batches
    assert unused() - before <= 16 * 32_000


def test_batches_of_changing_shapes_keep_what_they_hold():
    rows = [np.full((2 + 7 * k % 13, 5), k) for k in range(60)]
    batches = [*Dataset.from_sequence(rows).map(np.copy).batch(1)]
    for k, batch in enumerate(batches):
        assert (batch == k).all()
        assert batch.base.nbytes <= 2 * batch.nbytes


def test_the_last_batch_of_a_few_rows_does_not_hold_the_memory_of_a_full_one():
    for data in (MAKE[make]().batch(48) for make in MAKE):
        *_, last = data
        assert len(last) == 4
        assert last.base is None or last.base.nbytes <= 2 * last.nbytes


def test_copies_of_a_dataset_have_memory_of_their_own():
    data = shuffled().batch(8)
    first = next(iter(data))
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert not np.shares_memory(next(iter(other)), first)
        np.testing.assert_array_equal(next(iter(other)), first)
