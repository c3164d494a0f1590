"""``ctx.rng``: the same draws in every run, after a retry and after a resume."""

import contextvars
import json
import os
import threading

import interrupt_points
import numba
import numpy as np
import pytest

import dvkernels as dv

here = dv.get_replica_context


def draw(name="", count=3):
    return here().rng(name).integers(2**62, size=count).tolist()


def mirrored(seed=0, replicas=2):
    return dv.MirroredStrategy([f"cpu:{k}" for k in range(replicas)], seed=seed)


def steps_of(strategy, count, fn=draw):
    return [strategy.local_results(strategy.run(fn)) for _ in range(count)]


def test_draws_are_the_same_in_every_run_and_differ_by_step_replica_name_and_seed():
    with mirrored() as first, mirrored() as second, mirrored(np.uint8(1)) as other:
        draws = steps_of(first, 3)
        assert steps_of(second, 3) == draws
        numbers = [
            number
            for step in [*draws, *steps_of(other, 3), *steps_of(first, 3, lambda: draw("a"))]
            for replica in step
            for number in replica
        ]
        assert len(set(numbers)) == len(numbers) == 3 * 3 * 2 * 3


def test_more_replicas_draw_the_same_and_more():
    with mirrored(replicas=1) as few, mirrored(replicas=3) as many:
        assert steps_of(few, 1)[0] == steps_of(many, 1)[0][:1]


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: dv.OneDeviceStrategy("cpu:0", seed=seed),
        lambda seed: dv.MirroredStrategy(["cpu:0"], seed=seed),
        lambda seed: dv.CentralStorageStrategy(["cpu:0"], seed=seed),
        lambda seed: dv.MultiWorkerMirroredStrategy(devices=["cpu:0"], seed=seed),
        lambda seed: dv.Strategy(["cpu:0"], seed=seed),
    ],
)
def test_every_strategy_has_a_seed(make):
    with make(5) as strategy, mirrored(5, 1) as same:
        assert steps_of(strategy, 1) == steps_of(same, 1)
    for bad, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="seed: expected a non-negative integer"):
            make(bad)


def test_a_second_call_continues_and_names_are_independent_of_the_order():
    def twice():
        return draw("a") + draw("b") + draw("a")

    def otherwise():
        b, a = draw("b"), draw("a", 6)
        return a[:3] + b + a[3:]

    with mirrored() as first, mirrored() as second:
        assert steps_of(first, 2, twice) == steps_of(second, 2, otherwise)


def test_a_step_that_failed_is_tried_again_with_the_same_draws():
    def fails():
        draw()
        if here().replica_id_in_sync_group == 1:
            raise KeyError("once")

    with mirrored() as strategy, mirrored() as smooth:
        drawn = steps_of(strategy, 1)
        with pytest.raises(KeyError):
            strategy.run(fails)
        assert drawn + steps_of(strategy, 2) == steps_of(smooth, 3)


def test_a_run_within_merge_call_belongs_to_the_step_around_it():
    def outer():
        before = draw()
        inner = here().merge_call(lambda own: own.run(lambda: str(draw())))
        return before + json.loads(inner) + draw()

    with mirrored() as strategy, mirrored() as plain:
        nested = steps_of(strategy, 2, outer)
        assert nested == steps_of(plain, 2, lambda: draw(count=9))


def test_a_resume_continues_with_the_same_draws(tmp_path):
    with mirrored(2**1000) as strategy:
        draws = steps_of(strategy, 2)
        dv.Checkpoint(strategy=strategy).save(tmp_path / "two")
        draws += steps_of(strategy, 2)
    with mirrored(1) as resumed, mirrored(replicas=3) as more:
        steps_of(resumed, 5)
        for strategy in (resumed, more):
            dv.Checkpoint(strategy=strategy).restore(tmp_path / "two")
        assert resumed.state_dict() == {"seed": 2**1000, "num_steps": 2}
        assert steps_of(resumed, 2) == draws[2:]
        assert [step[:2] for step in steps_of(more, 2)] == draws[2:]


def test_a_save_within_a_step_resumes_behind_that_step(tmp_path):
    with mirrored() as strategy:
        saved = []

        def step():
            saved.append(here().merge_call(lambda own: own.state_dict()))
            return draw()

        draws = steps_of(strategy, 1, step) + steps_of(strategy, 1)
        with mirrored() as resumed:
            resumed.load_state_dict(saved[0])
            assert steps_of(resumed, 1) == draws[1:]


def test_checkpoints_without_a_strategy_can_still_be_restored(tmp_path):
    dv.Checkpoint(number=3).save(tmp_path / "old")
    with mirrored(4) as strategy:
        restored = dv.Checkpoint(number=0, strategy=strategy).restore(
            tmp_path / "old", partial=True
        )
        assert restored.missing == ("strategy",)
        assert strategy.state_dict()["seed"] == 4


@pytest.mark.parametrize(
    "state",
    [None, {}, {"seed": 1}, {"seed": 1, "num_steps": -1}, {"seed": True, "num_steps": 0},
     {"seed": 2**1024, "num_steps": 0}, {"seed": 0, "num_steps": 0, "more": 1}],
)  # fmt: skip
def test_damaged_states_change_nothing(state):
    with mirrored(9) as strategy:
        strategy.run(draw)
        with pytest.raises(dv.errors.CheckpointError, match="expected the seed and the number"):
            strategy.load_state_dict(state)
        assert strategy.state_dict() == {"seed": 9, "num_steps": 1}


def test_a_state_is_not_loaded_within_a_step():
    with mirrored() as strategy:
        state = strategy.state_dict()
        for fn in (
            lambda: strategy.load_state_dict(state),
            lambda: here().merge_call(lambda own: own.load_state_dict(state)),
        ):
            with pytest.raises(dv.errors.ContextError, match="within a step"):
                strategy.run(fn)
        started, done, failures = threading.Event(), threading.Event(), []

        def waits():
            started.set()
            assert done.wait(60)

        def loads():
            started.wait(60)
            try:
                strategy.load_state_dict(state)
            except dv.errors.ContextError as error:
                failures.append(error)
            done.set()

        thread = threading.Thread(target=loads)
        thread.start()
        strategy.run(waits)
        thread.join()
        assert "another thread runs a step" in str(failures[0])


@numba.njit
def compiled(rng):
    return rng.random() + rng.random()


def test_compiled_functions_draw_from_it():
    with mirrored() as strategy, mirrored() as plain:
        for _ in range(2):
            found = strategy.run(lambda: compiled(here().rng()))
            expected = plain.run(lambda: compiled.py_func(here().rng()))
            assert found.values == expected.values


def test_a_thread_of_a_replica_draws_from_the_generator_of_its_replica():
    def in_thread():
        found = []
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: found.append(draw()),))
        thread.start()
        thread.join()
        return found[0] + draw()

    with mirrored() as strategy, mirrored() as plain:
        assert steps_of(strategy, 2, in_thread) == steps_of(plain, 2, lambda: draw(count=6))


@pytest.mark.parametrize("name", [True, 1, None, b"a", np.float32, ["a"]])
def test_names_are_strings(name):
    with mirrored() as strategy, pytest.raises(TypeError, match="rng: expected name to be a str"):
        strategy.run(lambda: here().rng(name))


def test_after_the_run_it_raises():
    with mirrored() as strategy:
        contexts = strategy.run(here).values
        with pytest.raises(dv.errors.ContextError, match="has ended"):
            contexts[0].rng()


# An interrupted step is counted or tried again, and in either case draws what the table says.
INTERRUPTED = """
import dvkernels as dv

def draw():
    rng = dv.get_replica_context().rng("a")
    return str([*rng.integers(2**62, size=2), *dv.get_replica_context().rng("b").random(2)])

def made():
    return dv.MirroredStrategy(["cpu:0", "cpu:1"])

with made() as first:
    expected = [first.run(draw).values for _ in range(5)]

def make():
    strategy = made()
    strategy.run(draw)

    def check(was_raised):
        done = strategy.state_dict()["num_steps"]
        assert done in (1, 2), done
        assert [strategy.run(draw).values for _ in range(2)] == expected[done:done + 2]
        strategy.close()

    return lambda: strategy.run(draw), check
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")
@pytest.mark.parametrize(
    "sample", [pytest.param(25, marks=pytest.mark.wide), pytest.param(None, marks=pytest.mark.slow)]
)
def test_an_interrupted_step_draws_the_same_when_it_is_tried_again(sample):
    broken = interrupt_points.broken_in(INTERRUPTED, sample=sample)
    assert not broken, broken.text()


def test_outside_of_every_scope_the_generator_goes_on():
    name = "of this test"
    first = draw(name)
    inside = steps_of(dv.get_strategy(), 1, lambda: draw(name))[0][0]
    assert len({*first, *inside, *draw(name)}) == 9
    assert here().rng(name) is here().rng(name)
