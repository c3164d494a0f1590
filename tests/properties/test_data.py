"""Laws of the data pipeline over generated sizes, seeds, positions and numbers of replicas."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.shuffle import permute, round_keys

REPLICAS = st.sampled_from([1, 2, 3, 7])
SEEDS = st.integers(0, 2**70)


@st.composite
def datasets(draw):
    """A dataset of global batches; random access and sequential."""
    length = draw(st.integers(0, 40))
    if draw(st.booleans()):
        dataset = Dataset.from_arrays(np.arange(length))
    else:
        dataset = Dataset.from_sequence(list(range(length)))
    if draw(st.booleans()):
        dataset = dataset.shuffle(seed=draw(SEEDS))
    if draw(st.booleans()):
        dataset = dataset.repeat(draw(st.integers(0, 3)))
    if draw(st.booleans()):
        dataset = dataset.filter(lambda x: x % 3 != 1)
    return dataset.batch(draw(st.integers(1, 11)), drop_remainder=draw(st.booleans()))


def flat(batches):
    return [x for batch in batches for part in batch.values for x in part.tolist()]


@settings(max_examples=examples(60), deadline=None)
@given(
    length=st.integers(0, 60), size=st.integers(1, 20), replicas=REPLICAS, seed=SEEDS,
    epoch=st.integers(0, 5),
)  # fmt: skip
def test_every_element_is_delivered_exactly_once(length, size, replicas, seed, epoch):
    dataset = Dataset.range(length).shuffle(seed=seed).batch(size)
    distributed = DistributedDataset(dataset, replicas)
    distributed.set_epoch(epoch)
    batches = list(distributed)
    assert sorted(flat(batches)) == list(range(length))
    for batch in batches:
        sizes = [len(part) for part in batch.values]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@settings(max_examples=examples(60), deadline=None)
@given(dataset=datasets(), epoch=st.integers(0, 4))
def test_the_order_does_not_depend_on_the_number_of_replicas(dataset, epoch):
    orders = []
    for replicas in (1, 2, 3, 7):
        distributed = DistributedDataset(dataset, replicas)
        distributed.set_epoch(epoch)
        orders.append([flat([batch]) for batch in distributed])
    assert orders.count(orders[0]) == len(orders)


@settings(max_examples=examples(100), deadline=None)
@given(dataset=datasets(), before=REPLICAS, after=REPLICAS, epoch=st.integers(0, 3), data=st.data())
def test_an_iterator_saved_anywhere_resumes_with_the_same_tail(dataset, before, after, epoch, data):
    distributed = DistributedDataset(dataset, before)
    distributed.set_epoch(epoch)
    num_batches = len(list(distributed))
    distributed.set_epoch(epoch)
    iterator = iter(distributed)
    for _ in range(data.draw(st.integers(0, num_batches))):
        next(iterator)
    state = json.loads(json.dumps(iterator.state_dict()))
    resumed = iter(DistributedDataset(dataset, after))
    resumed.get_next_as_optional()
    resumed.load_state_dict(state)
    assert [flat([batch]) for batch in resumed] == [flat([batch]) for batch in iterator]
    assert resumed.state_dict() == iterator.state_dict()


@settings(max_examples=examples(60), deadline=None)
@given(length=st.integers(0, 5000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_shuffling_permutes(length, seed, epoch):
    order = permute(np.arange(length), length, round_keys(seed, epoch))
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(max_examples=examples(40), deadline=None)
@given(length=st.integers(20, 5000), seed=SEEDS, epochs=st.sets(st.integers(0, 99), min_size=2))
def test_epochs_differ(length, seed, epochs):
    orders = {permute(np.arange(20), length, round_keys(seed, epoch)).tobytes() for epoch in epochs}
    assert len(orders) == len(epochs)


@settings(max_examples=examples(40), deadline=None)
@given(length=st.integers(0, 50), num=st.integers(1, 8))
def test_the_shards_together_are_the_whole(length, num):
    dataset = Dataset.range(length).shuffle(seed=0)
    shards = [[int(x) for x in dataset.shard(num, index)] for index in range(num)]
    assert sorted(x for shard in shards for x in shard) == list(range(length))
