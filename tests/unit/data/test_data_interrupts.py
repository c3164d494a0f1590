"""An interrupt (Ctrl-C) at any point of an iterator's life loses no element and leaks no thread."""

from __future__ import annotations

import interrupt_points
import pytest

TOP = """
import gc, operator, os, queue, threading, time
import numpy as np
from dvkernels.data import sources, stacking
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset

sources._SHARED_NBYTES = stacking._LARGE_NBYTES = 1  # all batches use memory again

def sequence():
    return Dataset.range(40)

def rows():
    return Dataset.from_arrays(np.repeat(np.arange(40), 2)).shard(2, 0)

def stream():
    return Dataset.from_iterable(lambda: iter(range(40)))

def live():
    held = queue.SimpleQueue()
    for x in [*range(40), None]:
        held.put(x)
    return Dataset.from_live(held)

def new():
    data = DATA
    return iter(DistributedDataset(data, 1) if IS_DISTRIBUTED else data)

def numbers(batch):
    return (batch.values[0] if IS_DISTRIBUTED else batch).tolist()

def nothing_is_left():
    gc.collect()
    end = time.monotonic() + 8
    while any(thread.name.startswith("dvkernels-data") for thread in threading.enumerate()):
        assert time.monotonic() < end, "a thread stays"
        time.sleep(0.005)

def make():
    ACT
    return act, check

warm = new()  # first-use imports and compilation are not under test
next(warm)
warm.close()
del warm
"""
NEXT = """
    iterator, got, held = new(), [], [None]
    for _ in range(FIRST):
        got += numbers(next(iterator))
    def act():
        for held[0] in iterator:  # no call follows in which user code could lose the batch
            return
    def check(was_raised):
        assert not (was_raised and held[0] is not None)
        if held[0] is not None:
            got.extend(numbers(held[0]))
        for batch in iterator:
            got.extend(numbers(batch))
        assert got == [*range(40)], got
        iterator.close()
        nothing_is_left()
"""
ACTS = {
    "first next": NEXT.replace("FIRST", "0"),
    "next": NEXT.replace("FIRST", "1"),
    "new": """
    made = []
    def act():
        made.append(new())
    def check(was_raised):
        iterator = made[0] if made else new()
        assert [x for batch in iterator for x in numbers(batch)] == [*range(40)]
        nothing_is_left()
""",
    "close": """
    iterator = new()
    next(iterator)
    def act():
        iterator.close()
    def check(was_raised):
        iterator.close()
        nothing_is_left()
""",
    "drop": """
    iterator = [new()]
    next(iterator[0])
    def act():
        iterator.clear()
    def check(was_raised):
        iterator.clear()
        nothing_is_left()
""",
    "new epoch": """
    iterators = [new()]
    next(iterators[0])
    def act():
        iterators[0] = new()
        next(iterators[0])
    def check(was_raised):
        iterators[0] = new()
        assert [x for batch in iterators[0] for x in numbers(batch)] == [*range(40)]
        iterators.clear()
        nothing_is_left()
""",
}
DATA = {
    "sequence": "sequence().batch(4)",
    "rows": "rows().batch(4)",
    "prefetched rows": "rows().batch(4).prefetch(2)",
    "stream": "stream().map(operator.pos).batch(4)",
    "prefetch": "sequence().batch(4).prefetch(2)",
    "prefetched stream": "stream().batch(4).prefetch(2)",
    "threads": "sequence().map(operator.pos, num_workers=2).batch(4)",
    "threads of a stream": "stream().map(operator.pos, num_workers=2).batch(4)",
    "live": "live().batch(4)",
    "processes": "sequence().map(operator.pos, num_workers=2, workers='processes').batch(4)",
}


def broken_in(name, act, is_distributed, sample=None):
    program = TOP.replace("DATA", DATA[name]).replace("IS_DISTRIBUTED", str(is_distributed))
    program = program.replace("NAME", repr(name)).replace("ACT", ACTS[act].strip())
    return interrupt_points.broken_in(program, sample=sample)


@pytest.mark.parametrize("act", ACTS)
def test_a_sample_of_the_points(act):
    name = "prefetched rows" if act == "next" else "prefetch"
    report = broken_in(name, act, is_distributed=True, sample=4)
    assert not report, report.text()


@pytest.mark.slow
@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", DATA)
def test_all_points(name, act, is_distributed):
    if name == "live" and act in ("new", "new epoch"):
        pytest.skip("each of its iterators gets what the one before has left")
    sample = 25 if name == "processes" else None  # every point starts processes
    report = broken_in(name, act, is_distributed, sample)
    print(f"{report.num_struck} of {report.num_points} points")
    assert not report, report.text()
