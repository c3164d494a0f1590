"""Records and intrinsics: words by name from both sides, and arrays that outlive their address."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, records


class Sample(NamedTuple):
    first: int
    counter: int
    last: int


LAYOUT = records.layout(Sample, alone=["counter"])
sample_at, nth_sample = records.view(LAYOUT), records.nth(LAYOUT)


@jit.njit(cache=False)
def change(address):
    sample = sample_at(address)
    sample.last = sample.first + 1
    before = intrinsics.fetch_add(sample, "counter", 5)
    after = nth_sample(address, 1)
    after.last = intrinsics.compare_exchange(sample, "counter", before, 1)  # it is another
    after.first = intrinsics.exchange(sample, "counter", 7)
    intrinsics.store_shared(after, "counter", intrinsics.load_shared(sample, "counter"))


def test_python_and_compiled_code_see_the_same_fields() -> None:
    words = intrinsics.words(2 * LAYOUT.itemsize // 8)
    seen = words.view(LAYOUT)
    seen[0] = Sample(3, 20, 0)
    change(checks.address(words))
    assert [tuple(record) for record in seen] == [(3, 7, 4), (25, 7, 25)]


def test_fields_alone_share_their_cache_line_with_no_other() -> None:
    lines = {name: LAYOUT.fields[name][1] // records.LINE_NBYTES for name in Sample._fields}
    assert lines == {"first": 0, "counter": 1, "last": 2}
    assert records.index(LAYOUT, "counter") == 8


@jit.njit(cache=False)
def count_reuses(count):
    kept = np.empty(count, np.int64)
    address = intrinsics.address_of(kept)
    reuses = 0
    for _ in range(9):
        other = np.empty(count, np.int64)
        other[0] = intrinsics.address_of(other)
        reuses += other[0] == address
    intrinsics.keep_alive(kept)
    return reuses


def test_an_array_of_which_only_the_address_is_used_is_kept_alive() -> None:
    assert [count_reuses(count) for count in (1, 10, 100, 1000)] == [0] * 4
