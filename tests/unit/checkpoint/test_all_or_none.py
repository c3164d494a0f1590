"""Saves and restores by several workers, compared with one process that has all their replicas."""

from __future__ import annotations

import errno
import os
import tempfile

import faults
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import examples
from threads_as_workers import at_once, transports

import dvkernels as dv
from dvkernels.checkpoint.storage import file_system
from dvkernels.communicators.workers.group import WorkerGroup
from dvkernels.errors import CheckpointDamagedError, CheckpointError, DvKernelsError


def each_worker(counts, act):
    """Return the result or error of ``act(strategy)`` on workers of these numbers of replicas."""
    groups = [WorkerGroup(transport) for transport in transports(len(counts))]

    def work(group, count):
        with dv.Strategy([f"cpu:{k}" for k in range(count)], workers=group) as strategy:
            return act(strategy)

    calls = [lambda g=g, c=c: work(g, c) for g, c in zip(groups, counts, strict=True)]
    return at_once(*calls)


def rank_of(strategy):
    return strategy.distribute_values_from_function(lambda c: 0).owner.workers.rank


def done(outcomes):
    """Return outcomes; raise the first error among them."""
    for one in outcomes:
        if isinstance(one, Exception):
            raise one
    return outcomes


def build(strategy, modes, copies):
    """Return a variable whose copy in replica r is ``copies[r]``."""
    with strategy.scope():
        variable = dv.Variable(np.full(3, copies[0]), **modes)
    if modes.get("synchronization", "on_write") != "on_write":
        mine = strategy.distribute_values_from_function(
            lambda c: np.full(3, copies[c.replica_id_in_sync_group])
        )
        variable.assign(mine)
    return variable


def copies_of(variable):
    return [np.asarray(copy).tolist() for copy in variable.values]


MODES = [
    {},
    *({"synchronization": "on_read", "aggregation": how} for how in ("sum", "mean", "none")),
    {"synchronization": "on_read", "aggregation": "only_first_replica"},
    {"synchronization": "none"},
]
CIRCLE = []
CIRCLE.append(CIRCLE)
layouts = st.lists(st.integers(1, 2), min_size=1, max_size=3)


@settings(max_examples=examples(60), deadline=None)
@given(
    modes=st.sampled_from(MODES), before=layouts, after=layouts, seed=st.integers(0, 3),
    background=st.booleans(),
)  # fmt: skip
def test_several_workers_save_and_restore_as_one_process_would(
    modes, before, after, seed, background
):
    copies = np.random.default_rng(seed).integers(-3, 3, 6).astype(float) * (seed > 0)

    def save(strategy, path):
        with dv.Checkpoint(v=build(strategy, modes, copies)) as checkpoint:
            checkpoint.save(path, background=background)

    def restore(strategy, path):
        found = build(strategy, modes, np.full(6, 9.0))
        try:
            dv.Checkpoint(v=found).restore(path)
        except CheckpointError as error:
            return [str(error).partition(": ")[2], *copies_of(found)]
        return [None, *copies_of(found)]

    with tempfile.TemporaryDirectory() as folder:
        with dv.MirroredStrategy([f"cpu:{k}" for k in range(sum(before))]) as alone:
            save(alone, f"{folder}/alone")
        done(each_worker(before, lambda strategy: save(strategy, f"{folder}/team")))
        with dv.MirroredStrategy([f"cpu:{k}" for k in range(sum(after))]) as alone:
            expected_error, *expected = restore(alone, f"{folder}/alone")
        for name in ("alone", "team"):
            path = f"{folder}/{name}"
            found = done(each_worker(after, lambda s, path=path: restore(s, path)))
            assert [copy for _, *copies in found for copy in copies] == expected
            assert {error is None for error, *_ in found} == {expected_error is None}


class Run:
    """Objects of every kind on one worker, which all hold the same number."""

    def __init__(self, strategy, folder):
        self.rank = rank_of(strategy)
        self.strategy = strategy
        with strategy.scope():
            self.weight = dv.Variable(np.zeros(300))
            self.other = dv.Variable(np.zeros((2, 5)))
            self.own = dv.Variable(np.zeros(4), synchronization="none")
            self.seen = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
        self.adam = dv.optimizers.Adam(0.5)
        self.data = {"number": 0}
        self.array = np.zeros(5)
        self.rng = np.random.default_rng(3)
        self.checkpoint = dv.Checkpoint(
            weight=self.weight, other=self.other, own=self.own, seen=self.seen, adam=self.adam,
            data=self.data, array=self.array, rng=self.rng,
        )  # fmt: skip
        self.manager = dv.CheckpointManager(self.checkpoint, folder, max_to_keep=2)

    def become(self, number):
        for variable in (self.weight, self.other, self.own):
            variable.assign(np.full(variable.shape, float(number)))
        self.seen.assign(float(number))
        self.array[:] = number + self.rank  # the chief's is saved
        self.data.update(number=number, rank=self.rank)
        self.rng = self.checkpoint.objects["rng"] = np.random.default_rng(number)
        if number:
            self.strategy.run(lambda: self.adam.apply_gradients([(np.ones(300), self.weight)]))
            self.weight.assign(np.full(300, float(number)))

    def number(self):
        """Return the number that all objects hold; raise unless they agree."""
        number = self.data["number"]
        for variable in (self.weight, self.other, self.own):
            assert all((copy == number).all() for copy in variable.values)
        assert float(self.seen) == number
        assert (self.array == number).all()
        assert self.data.get("rank", 0) == 0
        if number:
            assert self.rng.random() == np.random.default_rng(number).random()
        return number


def restored(counts, folder):
    """Return the number that a fresh run restores from the newest checkpoint, on all workers."""

    def act(strategy):
        run = Run(strategy, folder)
        run.manager.restore_latest()
        return run.number()

    (number,) = set(done(each_worker(counts, act)))
    return number


def saving(number, folder, **options):
    def act(strategy):
        run = Run(strategy, folder)
        run.become(number)
        with run.manager:
            run.manager.save(number, **options)

    return act


def test_each_worker_writes_a_shard_and_the_chief_removes_old_checkpoints(tmp_path):
    for number in range(1, 5):
        done(each_worker([1, 2, 1], saving(number, tmp_path, background=number % 2 == 0)))
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    shards = [name for name in os.listdir(tmp_path / "step-00000004") if "shard" in name]
    assert len(shards) == 3
    for counts in ([1], [2], [3, 1], [1, 1, 1]):
        assert restored(counts, tmp_path) == 4


# Each file operation in turn fails once, on the worker that happens to do it.
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_failure_of_one_worker_fails_on_all(tmp_path, background):
    done(each_worker([1, 1, 1], saving(1, tmp_path)))
    number, named = 1, set()
    for place in range(1, 200):
        with faults.injected(faults.Faults(fail_at=place, error=errno.ENOSPC)) as injected:
            found = each_worker([1, 1, 1], saving(number + 1, tmp_path, background=background))
        if injected.count < place:
            break
        failed = [one for one in found if one is not None]
        assert len(failed) in (0, 3), "all fail, or none"
        assert all(isinstance(one, CheckpointError) for one in failed)
        named |= {text.partition(" failed: ")[0][-13:] for text in map(str, failed)}
        if not failed:
            number += 1
        assert restored([1], tmp_path) == number
    else:
        pytest.fail("a save has fewer operations")
    assert place > 20
    assert {f"worker {k} of 3" for k in (1, 2)} <= named, "the failed worker is named"
    done(each_worker([1, 1, 1], saving(number + 1, tmp_path)))
    assert all(name.startswith("step-") for name in os.listdir(tmp_path)), "no leftovers"


@pytest.mark.parametrize(
    "loses", [(), pytest.param(("content",), marks=pytest.mark.wide), ("names",)]
)
def test_a_kill_at_any_operation_leaves_a_valid_checkpoint(tmp_path, loses):
    done(each_worker([1, 1], saving(1, tmp_path)))

    def check():
        found.append(restored([1, 1], tmp_path))
        assert found[-1] in (1, 2)

    found = []
    faults.check_every_crash(lambda: each_worker([1, 1], saving(2, tmp_path)), check, loses=loses)
    assert found[0] == 1
    assert found[-1] == 2


def test_damage_found_by_one_worker_is_raised_by_all(tmp_path):
    for number in (1, 2):
        done(each_worker([1, 1], saving(number, tmp_path)))

    for place in (1, 2, 5, 9):
        injected = faults.Faults(fail_at=place, counted={"read"})
        with faults.injected(injected), pytest.warns(RuntimeWarning, match="newer ones are"):
            assert restored([1, 1], tmp_path) == 1
    with faults.injected(faults.Faults(fail_at=1, counted={"open"})):
        found = each_worker(
            [1, 1], lambda s: Run(s, tmp_path).checkpoint.restore(tmp_path / "step-00000002")
        )
    assert [type(one) for one in found] == [CheckpointDamagedError] * 2
    assert sum("of 2 failed" in str(one) for one in found) == 1


def test_objects_that_differ_between_workers_are_named(tmp_path):
    def act(strategy, change):
        run = Run(strategy, tmp_path)
        if run.rank == 1:
            change(run)
        run.manager.save(int(run.array[0]))

    def draw(run):
        run.rng.random()

    def one_more(run):
        run.checkpoint.objects["more"] = 1

    def step(run):
        run.array[0] = 7

    cases = [
        (draw, "for 'rng' worker 0 has a PCG64 generator in state .*, worker 1 a PCG64"),
        (one_more, "for 'more' worker 0 has nothing, worker 1 plain data"),
        (step, "for 'the step' worker 0 has 0, worker 1 7"),
    ]
    for change, words in cases:
        for error in each_worker([1, 1], lambda s, change=change: act(s, change)):
            with pytest.raises(CheckpointError, match=words):
                raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("odd", "fault"), [(object(), "odd: expected"), (CIRCLE, "odd/0: it is the list at odd again")]
)
def test_a_failed_snapshot_of_one_worker_is_raised_by_all(tmp_path, odd, fault):
    def act(strategy):
        run = Run(strategy, tmp_path)
        if run.rank == 1:
            run.checkpoint.objects = {"odd": odd, "weight": run.weight, "seen": run.seen}
        try:
            run.manager.save(1)
        finally:  # the next collective works
            assert strategy.reduce("sum", run.weight).shape == (300,)

    found = each_worker([1, 1, 1], act)
    assert [type(error) for error in found] == [CheckpointError] * 3
    assert str(found[1]).startswith(fault)
    for error in (found[0], found[2]):
        assert f"worker 1 raised CheckpointError: {fault}" in str(error)


def test_an_error_of_the_program_still_completes_the_background_save(tmp_path):
    def act(strategy):
        run = Run(strategy, tmp_path)
        run.become(5)
        with run.manager:
            run.manager.save(5, background=True)
            if run.rank == 1:
                raise ZeroDivisionError("of the program")
            strategy.reduce("sum", run.weight)

    first, second = each_worker([1, 1], act)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, DvKernelsError)
    assert "worker 1 raised ZeroDivisionError" in str(first)
    assert restored([1], tmp_path) == 5


def test_workers_that_see_different_files_raise(tmp_path):
    def act(strategy):
        run = Run(strategy, tmp_path / str(rank_of(strategy)))
        run.manager.save(1)

    (tmp_path / "1").mkdir()
    for error in each_worker([1, 1], act):
        assert isinstance(error, CheckpointError)
        assert "No such file" in str(error)
    assert os.listdir(tmp_path / "0") == []


def test_without_distributed_variables_each_worker_saves_alone(tmp_path):
    def act(strategy):
        rank = rank_of(strategy)
        rng = np.random.default_rng(rank)
        dv.Checkpoint(rng=rng).save(tmp_path / str(rank))

    done(each_worker([1, 1], act))
    for rank in range(2):
        rng = np.random.default_rng(9)
        dv.Checkpoint(rng=rng).restore(tmp_path / str(rank))
        assert rng.random() == np.random.default_rng(rank).random()


def test_workers_write_the_files_of_one_checkpoint(tmp_path):
    seen = []

    class Names(file_system.FileSystem):
        def create(self, path):
            seen.append(path.name)
            return super().create(path)

    with file_system.using(Names()):
        done(each_worker([1, 1, 1], saving(1, tmp_path)))
    assert sorted(seen) == [
        "manifest.json",
        *(f"shard-0000{k}.safetensors" for k in range(3)),
    ]
    assert seen[-1] == "manifest.json", "written when all shards are"
