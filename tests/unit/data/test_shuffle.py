import itertools
from collections import Counter

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.shuffle import BLOCK_LENGTH, permute, round_keys


def test_the_shuffle_permutes_every_small_length():
    for length in range(301):
        for seed in (0, 1):
            order = permute(np.arange(length), length, round_keys(seed, 0))
            np.testing.assert_array_equal(np.sort(order), np.arange(length))


@pytest.mark.parametrize("length", [4095, 4096, 4097, 65_536, 99_991, 1_000_000])
def test_the_shuffle_permutes_larger_lengths(length):
    order = permute(np.arange(length), length, round_keys(7, 3))
    assert np.bincount(order, minlength=length).tolist() == [1] * length


@pytest.mark.parametrize("length", [10**12, 2**40, 2**62])
def test_indices_of_huge_lengths_are_in_range_and_distinct(length):
    positions = np.concatenate([np.arange(50_000), length - 1 - np.arange(50_000)])
    order = permute(positions, length, round_keys(1, 1))
    assert order.min() >= 0
    assert order.max() < length
    assert len(np.unique(order)) == len(order)
    assert abs(order.mean() / length - 0.5) < 0.01


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_is_equally_likely(length):
    num_seeds = 2000
    found = Counter(
        tuple(permute(np.arange(length), length, round_keys(seed, 0)).tolist())
        for seed in range(num_seeds)
    )
    orders = list(itertools.permutations(range(length)))
    expected = num_seeds / len(orders)
    statistic = sum((found[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(100_000), 100_000, round_keys(0, 0))
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.001


def test_the_order_is_the_same_in_every_version():
    # If these numbers change, every saved position refers to other elements.
    assert [int(x) for x in Dataset.range(10).shuffle(seed=1)] == [5, 1, 8, 9, 4, 0, 3, 2, 6, 7]
    assert [int(x) for x in Dataset.range(10**12).shuffle(seed=1).take(3)] == [
        334761499847,
        453917322879,
        708624312391,
    ]


def test_batches_across_blocks_match_the_elements():
    length = 2 * BLOCK_LENGTH + 100
    order = permute(np.arange(length), length, round_keys(2, 0)).tolist()
    for size in (1000, 5000, length):
        batches = Dataset.range(length).shuffle(seed=2).batch(size)
        assert [x for batch in batches for x in batch.tolist()] == order
