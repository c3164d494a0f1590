"""Coroutine and generator functions are refused, however they are wrapped."""

from __future__ import annotations

import functools

import pytest

import dvkernels as dv


async def coroutine(*_):
    return 1


def generator(*_):
    yield 1


async def both(*_):
    yield 1


class Called:
    async def __call__(self, *_):
        return 1

    def method(self, *_):
        yield 1

    @classmethod
    async def of_the_class(cls, *_):
        return 1


LATE = {
    "coroutine": coroutine,
    "generator": generator,
    "asynchronous generator": both,
    "lambda with a yield": lambda *_: (yield),
    "partial": functools.partial(coroutine, 1),
    "partial of a partial": functools.partial(functools.partial(generator)),
    "object": Called(),
    "partial of an object": functools.partial(Called(), 1),
    "method": Called().method,
    "class method": Called.of_the_class,
}
ENTRIES = {
    "run": lambda s, v, fn: s.run(fn),
    "run with arguments": lambda s, v, fn: s.run(fn, (dv.PerReplica([1, 2]),)),
    "merge_call": lambda s, v, fn: s.run(lambda: dv.get_replica_context().merge_call(fn)),
    "default merge_call": lambda s, v, fn: dv.get_replica_context().merge_call(fn),
    "update": lambda s, v, fn: s.update(v, fn),
    "distribute_values_from_function": lambda s, v, fn: s.distribute_values_from_function(fn),
    "distribute_datasets_from_function": lambda s, v, fn: s.distribute_datasets_from_function(fn),
    "initial_value": lambda s, v, fn: dv.Variable(fn),
}


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("entry", ENTRIES)
def test_coroutines_and_generators_are_refused(strategy, entry, late):
    with strategy.scope():
        variable = dv.Variable(1.0)
    with pytest.raises(TypeError, match=r"expected a function.*(coroutine|generator) function"):
        ENTRIES[entry](strategy, variable, LATE[late])
    assert float(variable) == 1.0


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "initial_value"])
def test_an_object_that_is_not_callable_is_refused(strategy, entry):
    with strategy.scope():
        variable = dv.Variable(1.0)
    with pytest.raises(TypeError, match=r"expected a function, got 3, a int"):
        ENTRIES[entry](strategy, variable, 3)


def test_every_kind_of_plain_callable_is_accepted(strategy):
    class Adder:
        def __call__(self, *numbers):
            return sum(numbers)

    for fn in (Adder(), functools.partial(Adder(), 1), Adder().__call__, max, dict, Adder):
        strategy.run(fn, (3, 4) if fn is max else ())
