import collections

import numpy as np
import pytest

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.errors import DatasetError


def ints(elements):
    return [int(x) for x in elements]


def sequential(length):
    return Dataset.from_iterable(lambda: range(length))


def epoch_of(dataset, epoch):
    distributed = DistributedDataset(dataset.batch(5), 1)
    distributed.set_epoch(epoch)
    return [x for batch in distributed for x in batch.values[0].tolist()]


def test_all_elements_once_and_none_further_than_a_window():
    for window in (1, 2, 7, 40, 99):
        order = ints(sequential(40).shuffle(seed=1, window=window))
        assert sorted(order) == list(range(40))
        assert max(abs(x - place) for place, x in enumerate(order)) < window
    assert ints(sequential(40).shuffle(seed=1, window=1)) == list(range(40))


def test_the_order_is_a_function_of_seed_epoch_and_window():
    order = epoch_of(sequential(50).shuffle(seed=1, window=16), 0)
    assert epoch_of(sequential(50).shuffle(seed=1, window=16), 0) == order
    assert epoch_of(sequential(50).shuffle(seed=1, window=16), 1) != order
    assert epoch_of(sequential(50).shuffle(seed=2, window=16), 0) != order
    assert epoch_of(sequential(50).shuffle(seed=1, window=17), 0) != order
    fixed = sequential(50).shuffle(seed=1, window=16, reshuffle_each_epoch=False)
    assert epoch_of(fixed, 0) == epoch_of(fixed, 7) == order


def test_random_access_is_kept_and_gives_the_same_order():
    by_index = Dataset.range(50).shuffle(seed=1, window=16)
    assert by_index.node.random_access
    in_order = ints(sequential(50).shuffle(seed=1, window=16))
    assert ints(by_index) == in_order
    assert [x for b in by_index.batch(7) for x in b.tolist()] == in_order
    assert ints(by_index.shard(3, 1)) == in_order[1::3]
    assert [x for b in by_index.shard(3, 1).batch(4) for x in b.tolist()] == in_order[1::3]


def test_an_endless_dataset_can_be_shuffled():
    dataset = Dataset.range(6).repeat().shuffle(seed=0, window=4).take(60)
    assert collections.Counter(ints(dataset)).total() == 60


def test_the_source_is_read_a_window_at_a_time():
    read = []

    def numbers():
        for x in range(100):
            read.append(x)
            yield x

    iterator = iter(Dataset.from_iterable(numbers).shuffle(seed=0, window=10))
    for count in range(1, 60):
        next(iterator)
        assert len(read) < count + 10


def test_neighbours_share_a_window_in_some_epoch():
    dataset = sequential(64).shuffle(seed=0, window=8)
    swapped = np.zeros(63, bool)
    for epoch in range(60):
        place = np.argsort(epoch_of(dataset, epoch))
        swapped |= place[:-1] > place[1:]
    assert swapped.all()


def test_all_orders_occur_within_a_window():
    dataset = Dataset.range(3).shuffle(seed=0, window=50)
    orders = collections.Counter(tuple(epoch_of(dataset, epoch)) for epoch in range(300))
    whole = [count for order, count in orders.items()]
    assert len(whole) == 6
    assert min(whole) > 25


def test_without_a_window_the_error_says_to_pass_one():
    with pytest.raises(DatasetError, match=r"pass window=n to shuffle within windows"):
        sequential(3).shuffle(seed=0)


@pytest.mark.parametrize("window", [0, -1, 2.5, True])
def test_the_window_is_checked(window):
    with pytest.raises(DatasetError, match="expected window to be an integer of at least 1"):
        sequential(3).shuffle(seed=0, window=window)


def test_skipping_more_than_an_empty_dataset_has():
    assert list(Dataset.range(0).filter(bool).shuffle(seed=0, window=3).skip(4)) == []
