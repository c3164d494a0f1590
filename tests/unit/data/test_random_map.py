"""``random_map``: the draws belong to the element, whoever computes it and when."""

import json

import numpy as np
import pytest

from dvkernels import philox
from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.dataset import Dataset
from dvkernels.data.distributed import sharding
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.data.distributed.options import AutoShardPolicy, InputOptions
from dvkernels.errors import DatasetError


def tagged(x, rng):
    """Return the element, and a number that tells of which stream it is."""
    return np.int64(x), rng.integers(2**62)


def number(x, rng):
    return rng.integers(2**62)


def pairs(dataset):
    return [(int(x), int(drawn)) for x, drawn in dataset]


def drawn(dataset):
    return [int(x) for x in dataset]


def test_the_draws_are_those_of_the_documented_stream():
    found = drawn(Dataset.range(3).random_map(number, seed=7).with_epoch(2))
    key = np.array(philox.key_of("random_map", 7, 0, 2), np.uint64)
    streams = [np.random.Philox(key=key, counter=[0, index, 0, 0]) for index in range(3)]
    assert found == [int(np.random.Generator(each).integers(2**62)) for each in streams]
    assert found[:2] == [4145328396968869927, 4001546094419802242]


def test_seed_place_epoch_and_element_have_streams_of_their_own():
    once = Dataset.range(5).random_map(tagged, seed=0)
    twice = Dataset.range(5).random_map(lambda x, rng: x, seed=0).random_map(tagged, seed=0)
    found = [
        value
        for dataset in (once, Dataset.range(5).random_map(tagged, seed=1), twice)
        for epoch in range(3)
        for _, value in pairs(dataset.with_epoch(epoch))
    ]
    assert len(set(found)) == len(found) == 3 * 3 * 5


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_workers_and_prefetching_change_no_draw(num_workers, prefetch):
    plain = Dataset.range(20).filter(lambda x: x % 3).random_map(tagged, seed=1)
    same = Dataset.range(20).prefetch(prefetch).filter(lambda x: x % 3)
    same = same.random_map(tagged, seed=1, num_workers=num_workers).prefetch(prefetch)
    assert pairs(same) == pairs(plain)


def test_processes_draw_the_same():
    plain = Dataset.range(7).random_map(tagged, seed=1)
    apart = Dataset.range(7).random_map(tagged, seed=1, num_workers=1, workers="processes")
    both = [[batch[1].tolist() for batch in each.batch(4)] for each in (plain, apart)]
    assert both[0] == both[1]


def files(folder, count, rows):
    """Return a sequential dataset of several files."""
    paths = [folder / str(k) for k in range(count)]
    for path in paths:
        path.touch()
    return Dataset.from_files(paths, lambda path: iter(range(rows)))


def rows_of(dataset, num_replicas):
    """Return the rows of all batches of a distributed dataset, as pairs."""
    return [
        pair
        for xs, numbers in DistributedDataset(dataset, num_replicas)
        for part in zip(xs.values, numbers.values, strict=True)
        for pair in zip(*map(np.ndarray.tolist, part), strict=True)
    ]


@pytest.mark.parametrize("policy", [AutoShardPolicy.AUTO, AutoShardPolicy.DATA])
@pytest.mark.parametrize("replicas", [[1], [3], [1, 1], [2, 1, 2]])
def test_any_number_of_replicas_and_workers_draws_the_same(replicas, policy, tmp_path):
    for source in (Dataset.range(20), files(tmp_path, 5, rows=4)):
        dataset = source.random_map(tagged, seed=1)
        node = dataset.batch(6).node
        found = []
        for worker, num_replicas in enumerate(replicas):
            own = sharding.shard(node, WorkerShare(tuple(replicas), worker), policy)
            found += rows_of(Dataset(own.node), num_replicas)
        assert sorted(found) == sorted(pairs(dataset))


def test_files_are_not_shared_out_whole_where_elements_are_counted(tmp_path):
    dataset = files(tmp_path, 2, rows=4).random_map(tagged, seed=1)
    share = WorkerShare((1, 1), 0)
    with pytest.raises(DatasetError, match=r"random_map\(tagged, seed=1\) counts elements of all"):
        sharding.shard(dataset.batch(2).node, share, AutoShardPolicy.FILE)


def test_a_shuffle_before_and_one_behind():
    before = Dataset.range(9).shuffle(seed=2).random_map(tagged, seed=1)
    behind = Dataset.range(9).random_map(tagged, seed=1).shuffle(seed=2)
    plain = pairs(Dataset.range(9).random_map(tagged, seed=1))
    assert sorted(pairs(behind)) == plain  # the draws stay with the elements
    assert [value for _, value in pairs(before)] == [value for _, value in plain]  # by position


def test_each_repetition_draws_anew():
    repeated = pairs(Dataset.range(3).random_map(tagged, seed=1).repeat(2))
    assert len(set(repeated)) == 6
    once = Dataset.range(3).random_map(tagged, seed=1)
    assert repeated == pairs(once) + pairs(once.with_epoch(1))
    endless = Dataset.range(1).random_map(number, seed=1).repeat().repeat().take(3)
    assert len(set(drawn(endless.with_epoch(2**40)))) == 3  # epochs of more than 64 bits


@pytest.mark.parametrize("between", [lambda d: d, lambda d: d.map(lambda x: x).prefetch(1)])
def test_shards_draw_what_the_whole_draws(between):
    whole = pairs(Dataset.range(20).random_map(tagged, seed=1))
    found = []
    for outer in range(2):
        for inner in range(3):
            shard = between(Dataset.range(20).shard(2, outer).shard(3, inner))
            found += pairs(shard.random_map(tagged, seed=1))
    assert sorted(found) == whole


def test_shards_of_filtered_or_shuffled_elements_have_streams_of_their_own():
    for change in (lambda d: d.filter(lambda x: x % 4 < 2), lambda d: d.shuffle(seed=1)):
        shards = [
            drawn(change(Dataset.range(20).shard(2, k)).random_map(number, seed=1))
            for k in range(2)
        ]
        assert not set(shards[0]) & set(shards[1])


def test_a_resume_draws_the_same_on_another_number_of_replicas():
    dataset = Dataset.range(24).shuffle(seed=1).random_map(number, seed=1).batch(4).repeat(2)

    def rows(iterator, most):
        found = []
        while len(found) < most and (step := iterator.get_next_as_optional()).has_value():
            found.append([x for part in step.get_value().values for x in part.tolist()])
        return found

    with iter(DistributedDataset(dataset, 2)) as iterator:
        whole = rows(iterator, 99)
    with iter(DistributedDataset(dataset, 2)) as iterator:
        assert rows(iterator, 5) == whole[:5]
        state = json.loads(json.dumps(iterator.state_dict()))
    with iter(DistributedDataset(dataset, 3, options=InputOptions(prefetch=0))) as iterator:
        iterator.load_state_dict(state)
        assert rows(iterator, 99) == whole[5:]


def test_another_seed_is_another_pipeline():
    states = []
    for seed in (1, 2):
        with iter(DistributedDataset(Dataset.range(4).random_map(number, seed=seed), 1)) as each:
            states.append(each.state_dict())
            if seed == 2:
                with pytest.raises(DatasetError, match=r"random_map\(number, seed=1\)"):
                    each.load_state_dict(states[0])


def test_a_generator_that_the_function_keeps_stays_its_own():
    kept = []
    dataset = Dataset.range(3).random_map(lambda x, rng: kept.append(rng) or x, seed=1)
    expected = drawn(Dataset.range(3).random_map(number, seed=1))
    list(dataset)
    assert [int(rng.integers(2**62)) for rng in kept] == expected


def test_a_failing_element_draws_the_same_at_the_next_try():
    tries = []

    def fails_once(x, rng):
        tries.append(int(rng.integers(2**62)))
        if len(tries) == 2:
            raise KeyError(x)
        return tries[-1]

    iterator = iter(Dataset.range(3).random_map(fails_once, seed=1))
    next(iterator)
    with pytest.raises(KeyError) as caught:
        next(iterator)
    assert "fails_once, seed=1) failed at element 1 of range(3)" in caught.value.__notes__[0]
    assert next(iterator) == tries[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fn": 3, "seed": 1}, "random_map: expected a function; got 3"),
        ({"fn": number, "seed": -1}, "random_map: expected seed to be a non-negative integer"),
        ({"fn": number, "seed": True}, "random_map: expected seed to be a non-negative integer"),
        ({"fn": number, "seed": 2**1024}, "of at most 1024 bits"),
        ({"fn": number, "seed": 1, "num_workers": -1}, "random_map: expected num_workers"),
        ({"fn": number, "seed": 1, "workers": "tasks"}, "random_map: expected workers to be one"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(DatasetError, match=text):
        Dataset.range(3).random_map(**arguments)
