"""Shares of batches follow the speed of the replicas, settle there, and leave answers alone."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import interrupt_points
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples

import dvkernels as dv
from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.distributed.balancer import Balancer, divide
from dvkernels.data.distributed.dataset import DistributedDataset
from dvkernels.errors import DatasetError
from dvkernels.replicas import work_meter
from dvkernels.replicas.work_meter import WorkMeter
from dvkernels.schedules import partition

here = dv.get_replica_context
MEASURED = dv.InputOptions(balance="measured")


@given(st.integers(0, 2000), st.lists(st.floats(1e-6, 1), min_size=1, max_size=9))
def test_division_is_exact_and_leaves_nobody_out(length, weights):
    shares = [weight / sum(weights) for weight in weights]
    counts = divide(length, shares)
    assert sum(counts) == length
    assert min(counts) >= (length >= len(shares))
    for count, share in zip(counts, shares, strict=True):
        assert count < length * share + 1 or count == 1
    assert counts == divide(length, shares)


@given(st.integers(0, 2000), st.integers(1, 9))
def test_equal_shares_are_the_even_split(length, num_replicas):
    even = [stop - start for start, stop in partition.parts(length, num_replicas)]
    assert divide(length, [1 / num_replicas] * num_replicas) == even


class Simulation:
    """Batches of one length, divided by a balancer; ``work(replica, rows)`` is measured."""

    def __init__(self, num_replicas, length, work):
        self.meter = WorkMeter(num_replicas)
        self.balancer = Balancer(self.meter)
        self.length, self.work = length, work

    def run(self, num_batches):
        """Return the counts of all batches."""
        found = []
        for _ in range(num_batches):
            counts = tuple(stop - start for start, stop in self.balancer.parts(self.length))
            self.meter.add([float(self.work(k, count)) for k, count in enumerate(counts)])
            found.append(counts)
        return found

    def slowest(self, counts):
        return max(self.work(k, count) for k, count in enumerate(counts))


WORKS = {
    "in proportion": lambda cost, rows: cost * rows,
    "a fixed part": lambda cost, rows: 10 + cost * rows,
    "grows with the square": lambda cost, rows: cost * rows**2,
    "grows with the root": lambda cost, rows: cost * rows**0.5,
}


@pytest.mark.parametrize("kind", WORKS)
@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.floats(1, 8), min_size=2, max_size=6), st.integers(40, 400))
def test_shares_settle_where_all_replicas_take_equally_long(kind, costs, length):
    simulation = Simulation(len(costs), length, lambda k, rows: WORKS[kind](costs[k], rows))
    counts = simulation.run(400)
    assert len(set(counts[300:])) == 1, "they do not settle"
    assert simulation.slowest(counts[-1]) <= simulation.slowest(counts[0])
    if kind != "grows with the root":  # equal times are far from even shares: on the way there
        times = [simulation.work(k, count) for k, count in enumerate(counts[-1])]
        grain = max(
            time - simulation.work(k, count - 1)
            for k, (time, count) in enumerate(zip(times, counts[-1], strict=True))
        )
        assert max(times) <= 1.06 * sum(times) / len(times) + 2 * grain


def test_noise_and_outliers_do_not_move_the_shares():
    noise = random.Random(7)

    def work(replica, rows):
        outlier = 20 if noise.random() < 0.1 else 1
        return outlier * noise.uniform(0.93, 1.07) * (2 if replica else 1) * rows

    counts = Simulation(2, 300, work).run(1000)
    ratios = np.divide(*np.transpose(counts[60:]))
    assert np.mean((ratios > 1.7) & (ratios < 2.3)) > 0.98
    assert np.count_nonzero(np.diff(ratios)) <= 8


def test_work_that_is_not_in_proportion_to_rows_ends_the_attempts():
    counts = Simulation(2, 300, lambda k, rows: 1.0 + k).run(1000)
    assert set(counts[200:]) == {(150, 150)}


def test_a_replica_that_gets_slow_and_fast_again():
    costs = [1.0, 1.0, 1.0]
    simulation = Simulation(3, 300, lambda k, rows: costs[k] * rows)
    assert set(simulation.run(50)) == {(100, 100, 100)}
    costs[1] = 4.0
    after = simulation.run(50)
    assert after[-1][1] == pytest.approx(300 / 9, rel=0.15)
    costs[1] = 1.0
    assert max(simulation.run(50)[-1]) <= 105
    costs[1] = 1e6  # keeps one row, so that it is seen when it recovers
    assert simulation.run(100)[-1][1] == 1
    costs[1] = 1.0
    assert max(simulation.run(300)[-1]) <= 110


def test_short_last_batches_of_epochs_mislead_nobody():
    for num_whole in range(1, 25):
        simulation = Simulation(2, 90, lambda k, rows: 0.1 + (k + 1) * rows)
        found = []
        for _ in range(150 // num_whole):
            simulation.length = 90
            found += simulation.run(num_whole)
            simulation.length = 3
            simulation.run(1)
        assert len(set(found[-20:])) == 1
        assert found[-1][0] in range(57, 64)


def test_small_batches_settle_too():
    for length in range(1, 9):
        simulation = Simulation(3, length, lambda k, rows: 0.5 + (k + 1) * rows)
        assert len(set(simulation.run(200)[100:])) == 1


def test_what_is_not_measured():
    simulation = Simulation(2, 10, lambda k, rows: 0.0)  # a clock that does not tick
    assert set(simulation.run(30)) == {(5, 5)}
    balancer = simulation.balancer
    assert all(balancer.parts(10) == [(0, 5), (5, 10)] for _ in range(30))  # no steps
    simulation.work = lambda k, rows: float(k + 1)
    simulation.length = 0  # no rows
    simulation.run(30)
    simulation.length = 1  # no row for replica 1
    simulation.run(30)
    assert balancer.parts(10) == [(0, 5), (5, 10)]
    assert balancer.seconds_per_element == ()


class Clock(threading.local):
    """A clock of each thread, which moves only when that thread works."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(work_meter, "perf_counter", made)
    return made


DATA = np.random.default_rng(5)
X = DATA.standard_normal((2000, 3)).astype(np.float32)
Y = (X @ np.array([1, -2, 3], np.float32)).astype(np.float32)


def fit(strategy, clock, costs, options):
    """Return the weights of a linear model, the means of its losses, and the counts by step."""
    with strategy.scope():
        w = dv.Variable(np.zeros(3, np.float32))
    optimizer = dv.optimizers.SGD(0.05)
    data = dv.Dataset.from_arrays((X, Y)).shuffle(seed=3).batch(50).repeat(3)

    def step(x, y):
        clock.now += costs[here().replica_id_in_sync_group] * len(x)
        error = x @ w.read_value() - y
        gradient = x.T @ error / max(1, len(x))
        loss = here().all_reduce("mean", np.float64((error**2).sum() / max(1, len(x))),
                                 weight=len(x))  # fmt: skip
        optimizer.apply_gradients([(gradient, w)], weight=len(x))
        return loss

    losses, counts = [], []
    with iter(strategy.distribute_dataset(data, options)) as batches:
        for x, y in batches:
            losses.append(strategy.run(step, (x, y))[0])
            counts.append([len(part) for part in x.values])
        return w.numpy(), losses, counts, batches.stats(), repr(batches)


def test_training_gives_the_answer_of_one_device_and_the_shares_follow_the_speed(clock):
    costs = [1.0, 3.0, 1.0]
    with dv.OneDeviceStrategy("cpu:0") as one:
        expected, losses_of_one, *_ = fit(one, clock, costs, None)
    with dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"]) as three:
        found, losses, counts, stats, shown = fit(three, clock, costs, MEASURED)
        *_, unmeasured, plain = fit(three, clock, costs, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-3, atol=1e-9)
    assert counts[0] == [17, 17, 16]
    assert counts[-1][1] == pytest.approx(50 / 7, abs=1)
    assert stats.shares == pytest.approx([3 / 7, 1 / 7, 3 / 7], abs=0.02)
    assert stats.seconds_per_element == pytest.approx(costs)
    assert "shares=(0.4" in shown
    assert unmeasured.shares == unmeasured.seconds_per_element == ()
    assert "shares" not in plain


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_element_once_and_positions_are_independent_of_the_shares(clock, prefetch):
    options = dv.InputOptions(balance="measured", prefetch=prefetch)
    data = dv.Dataset.range(503).shuffle(seed=1).batch(10)
    expected = [batch.values[0].tolist() for batch in DistributedDataset(data, 1)]
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as two:

        def step(rows):
            clock.now += len(rows) * (1 + 3 * here().replica_id_in_sync_group)

        def read(batches, count):
            found, counts = [], []
            for batch in (next(batches) for _ in range(count)):
                two.run(step, (batch,))
                found.append(np.concatenate(batch.values).tolist())
                counts.append(len(batch.values[0]))
            return found, counts

        distributed = two.distribute_dataset(data, options)
        with iter(distributed) as batches:
            head, counts = read(batches, 40)
            assert counts[0] == 5
            assert counts[-1] == 8
            state = batches.state_dict()
            tail, _ = read(batches, len(expected) - 40)
        assert head + tail == expected
        with iter(DistributedDataset(data, 3)) as unbalanced:  # elsewhere, by another division
            unbalanced.load_state_dict(state)
            assert [np.concatenate(batch.values).tolist() for batch in unbalanced] == tail
        # What was measured serves the next epoch, also of a dataset that is distributed anew.
        for again in (distributed, two.distribute_dataset(data, options)):
            assert len(next(iter(again)).values[0]) == 8


def test_a_batch_that_fails_is_divided_again():
    failing = {7}

    def careful(x):
        if x in failing:
            raise ValueError("not yet")
        return x

    iterator = iter(
        DistributedDataset(dv.Dataset.range(12).map(careful).batch(4), 2, options=MEASURED)
    )
    found = next(iterator).values[0].tolist()
    with pytest.raises(ValueError, match="not yet"):
        next(iterator)
    failing.clear()
    found += [int(x) for batch in iterator for x in np.concatenate(batch.values)]
    assert found == [0, 1, *range(4, 12)]


def test_each_worker_balances_its_own_replicas():
    data, shares = dv.Dataset.range(400).batch(8), WorkerShare([2, 2]).num_rows(8)
    seen = []
    for worker, costs in enumerate([(1.0, 3.0), (1.0, 1.0)]):
        meter = WorkMeter(2)
        share = WorkerShare([2, 2], worker)
        exchange = lambda message: [message, message]  # noqa: E731 - the workers report the same
        distributed = DistributedDataset(
            data,
            2,
            share=share,
            exchange=exchange,
            options=MEASURED,
            measure_work=lambda m=meter: m,
        )
        for batch in distributed:
            counts = [len(part) for part in batch.values]
            assert sum(counts) == shares[worker]
            meter.add([cost * count for cost, count in zip(costs, counts, strict=True)])
            seen += np.concatenate(batch.values).tolist()
        assert counts == [[3, 1], [2, 2]][worker]
    assert sorted(seen) == [*range(400)]


def test_workers_that_read_files_of_their_own_and_the_end_of_a_worker_without_rows(tmp_path):
    files = {tmp_path / "a": range(90), tmp_path / "b": range(90, 200)}
    for path in files:
        path.touch()
    data = dv.Dataset.from_files(sorted(files), lambda path: iter(files[Path(path)])).batch(20)
    meters = [WorkMeter(2), WorkMeter(2)]
    barrier, messages = threading.Barrier(2, timeout=20), [None, None]

    def read(worker):
        def exchange(message):
            messages[worker] = message
            barrier.wait()
            found = [*messages]
            barrier.wait()
            return found

        found = []
        for batch in DistributedDataset(
            data, 2, share=WorkerShare([2, 2], worker), exchange=exchange, options=MEASURED,
            measure_work=lambda: meters[worker],
        ):  # fmt: skip
            counts = [len(part) for part in batch.values]
            meters[worker].add([1.0 * counts[0], 3.0 * counts[1]])
            found.append([*batch.values])
        return found

    with ThreadPoolExecutor(2) as pool:
        distributed = [*pool.map(read, range(2))]
    assert len(distributed[0]) == len(distributed[1]) == 11
    for found, expected in zip(distributed, files.values(), strict=True):
        assert [int(x) for batch in found for part in batch for x in part] == [*expected]
    assert [len(part) for part in distributed[0][-1]] == [0, 0]


def test_a_strategy_of_one_replica():
    with dv.OneDeviceStrategy("cpu:0") as one:
        batches = iter(one.distribute_dataset(dv.Dataset.range(60).batch(2), MEASURED))
        assert [one.run(lambda x: len(x), (batch,))[0] for batch in batches] == [2] * 30
        assert batches.stats().shares == (1.0,)


def test_wrong_uses_are_refused():
    for wrong in ("fast", "Measured", None, True, np.ones(2)):
        with pytest.raises(ValueError, match="expected balance to be 'none' or 'measured'; got"):
            dv.InputOptions(balance=wrong)
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as two:
        make = lambda context: dv.Dataset.range(4).batch(2)  # noqa: E731
        with pytest.raises(DatasetError, match="use distribute_dataset, which divides"):
            two.distribute_datasets_from_function(make, MEASURED)
        batches = iter(two.distribute_dataset(dv.Dataset.range(4), MEASURED))
        with contextlib.closing(batches), pytest.raises(DatasetError, match=r"call \.batch"):
            next(batches)


# A batch that an interrupt struck is delivered again; the shares stay valid, and go on adapting.
INTERRUPTED = """
import numpy as np
import dvkernels as dv

here = dv.get_replica_context
OPTIONS = dv.InputOptions(balance="measured")

def make():
    strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
    batches = iter(strategy.distribute_dataset(dv.Dataset.range(320).batch(8), OPTIONS))
    balancer = batches._distribution.splitter.balancer
    found = []

    def step(rows):
        return float(here().all_reduce("sum", float(rows.sum())))

    def read():
        batch = next(batches)
        found.append(np.concatenate(batch.values).tolist())
        assert strategy.run(step, (batch,)).values[0] == sum(found[-1])

    for _ in range(12):  # the next one judges the shares
        read()
    position = len(found)

    def act():
        strategy.run(step, (next(batches),))

    def check(was_raised):
        delivered = batches.state_dict()["position"]
        assert delivered in (position, position + 1)
        del found[:]
        while delivered + len(found) < 40:
            read()
        assert sum(found, []) == [*range(8 * delivered, 320)]
        assert abs(sum(balancer.shares) - 1) < 1e-9 and min(balancer.shares) > 0
        strategy.close()

    return act, check

act, check = make()
act()
check(False)
"""


@pytest.mark.wide
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")
def test_interrupts_at_any_point_of_a_measured_step():
    broken = interrupt_points.broken_in(INTERRUPTED, sample=60)
    assert not broken, broken.text()
