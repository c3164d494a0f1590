"""Streams of random numbers: which they are, that no two are equal, who may hold a generator."""

import threading

import numpy as np
import pytest

from dvkernels import philox


def draws(generator, count=4):
    return generator.bit_generator.random_raw(count).tolist()


def test_the_streams_are_those_of_every_version():
    generators = philox.StrategyGenerators(7, num_local=2)
    generators.num_done = 3
    assert philox.key_of("rng", 7, "noise") == (5054079191366162726, 4583631123403061426)
    assert [draws(generators.of_replica(1, 1, "noise"), 2), draws(generators.outside(""), 2)] == [
        [16133758952394611664, 9288494597187930078], [17112977619985156737, 16345560219581685492],
    ]  # fmt: skip
    assert draws(generators.of_item(0, 5, "noise"), 2) == [
        2234152223860093816,
        10599007503234342426,
    ]
    key = philox.key_of("random_map", 7, 0, 2)
    assert philox.call_with_generator(lambda _, rng: draws(rng, 2), 0, key, 2**64 + 9) == [
        17225999633783097030,
        8723452417602143672,
    ]


def test_a_stream_is_philox_with_key_and_counter_as_documented():
    generators = philox.StrategyGenerators(7)
    generators.num_done = 3
    key = np.array(philox.key_of("rng", 7, "a"), np.uint64)
    documented = np.random.Philox(key=key, counter=[0, 3, 0, 5])
    assert draws(generators.of_replica(0, 5, "a")) == documented.random_raw(4).tolist()


def test_no_two_streams_are_equal_or_overlap():
    seen, count = set(), 0
    for seed in (0, 1, 10, 2**64, 2**1024 - 1):
        for name in ("", "a", "1/a", "0", "ä", "\ud800"):
            generators = philox.StrategyGenerators(seed)
            for step in (0, 1, 2**63):
                generators.num_done = step
                for replica in (0, 1, 2**32):
                    seen.update(draws(generators.of_replica(0, replica, name), 16))
                    count += 16
            seen.update(draws(generators.of_item(0, step, name), 16))
            seen.update(draws(generators.outside(name), 16))
            count += 32
    assert len(seen) == count  # 64-bit numbers: two of 10^4 are equal in 1 of 10^11 tests


def test_neighbouring_streams_are_uncorrelated_and_uniform():
    generators = philox.StrategyGenerators()
    rows = []
    for step in range(40):
        generators.num_done = step
        rows += [generators.of_replica(0, replica, "").random(200) for replica in range(5)]
    numbers = np.array(rows)
    counts = np.bincount((numbers[:, :2] * 10).astype(int).ravel(), minlength=10)
    assert ((counts - 40) ** 2 / 40).sum() < 28  # chi-squared of 9 degrees, at 0.001
    correlations = np.corrcoef(numbers)[np.triu_indices(200, 1)]
    assert abs(correlations).max() < 6 / np.sqrt(200)


def test_jumped_generators_meet_no_other_replica_or_step():
    here = philox.StrategyGenerators().of_replica(0, 0, "")
    counter = here.bit_generator.jumped(3).state["state"]["counter"].tolist()
    assert counter == [0, 0, 3, 0]


@pytest.mark.parametrize("holds", ["generator", "bit generator", "method"])
def test_a_generator_that_somebody_holds_goes_on_with_its_own_stream(holds):
    generators, twin = philox.StrategyGenerators(), philox.StrategyGenerators()
    held = generators.of_replica(0, 0, "")
    held, bits = {
        "generator": lambda: (held, held.bit_generator),
        "bit generator": lambda: (held.bit_generator, held.bit_generator),
        "method": lambda: (held.random, held.bit_generator),
    }[holds]()
    for each in (generators, twin):
        each.num_done = 1
    del bits
    new = generators.of_replica(0, 0, "")
    assert draws(new) == draws(twin.of_replica(0, 0, ""))
    twin.num_done = 0
    first = twin.of_replica(0, 0, "")
    if holds == "method":
        assert held() == first.random()
    else:
        assert getattr(held, "bit_generator", held).random_raw() == draws(first)[0]


def test_a_generator_that_nobody_holds_is_used_again():
    generators = philox.StrategyGenerators()
    address = id(generators.of_replica(0, 0, "a").bit_generator)
    other = np.random.Philox()  # would get the freed memory
    generators.num_done = 1
    assert id(generators.of_replica(0, 0, "a").bit_generator) == address != id(other)


def test_names_of_earlier_steps_take_no_memory():
    generators = philox.StrategyGenerators()
    for step in range(50):
        generators.num_done = step
        generators.of_replica(0, 0, f"of step {step}")
    store = generators._of_rank[0]
    assert len(store._spare) + sum(map(len, store._generators.values())) <= 2


def test_threads_of_a_replica_share_one_generator():
    generators = philox.StrategyGenerators()
    for step in range(20):
        generators.num_done = step
        start, found = threading.Barrier(4), []

        def ask(start=start, found=found):
            start.wait()
            found.append(generators.of_replica(0, 0, ""))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(each) for each in found}) == 1


def test_calls_within_calls_have_generators_of_their_own():
    key = philox.key_of("random_map", 0, 0, 0)

    def outer(_, rng):
        before = draws(rng, 1)
        inner = philox.call_with_generator(lambda _, rng: draws(rng), None, key, 1)
        return before + draws(rng, 3), inner

    alone = [
        philox.call_with_generator(lambda _, rng: draws(rng), None, key, index) for index in (0, 1)
    ]
    assert philox.call_with_generator(outer, None, key, 0) == tuple(alone)


@pytest.mark.parametrize("seed", [-1, 2**1024, np.int64(-3)])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match=r"seed: expected a non-negative integer.*got .*; pass"):
        philox.check_seed(seed)


@pytest.mark.parametrize("seed", [None, True, 1.0, "1", [1], np.float64(2)])
def test_seeds_of_another_type(seed):
    with pytest.raises(TypeError, match=r"seed: expected a non-negative integer.*got .*; pass"):
        philox.check_seed(seed)
