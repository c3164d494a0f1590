"""Exceptions of user code leave the library unchanged, however strange their class is."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback

import numpy as np
import pytest
from threads_as_workers import WorkerGroup, at_once, transports

import dvkernels as dv
from dvkernels import user_errors
from dvkernels.errors import (
    CheckpointError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DatasetError,
    DvKernelsError,
    WorkerLostError,
)
from dvkernels.profiler import tracing


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int = 5


class Unprintable(Exception):
    def __str__(self):
        raise ZeroDivisionError("in __str__")

    __repr__ = __str__


class NoNotes(Exception):
    __notes__ = 7

    def add_note(self, note):
        raise RuntimeError("no notes")


class NoLinks(Exception):
    @property
    def __cause__(self):
        raise RuntimeError("no cause")

    __context__ = __cause__


class Slotted(Exception):
    __slots__ = ()

    def __setattr__(self, name, value):
        raise RuntimeError("read-only")


class Stop(BaseException):
    def __str__(self):
        return 5


class Mismatch(CollectiveMismatchError):
    def __init__(self, first, second):
        super().__init__(first)


class Late(CollectiveTimeoutError):
    def __init__(self, *, worker):
        super().__init__()

    __str__ = Unprintable.__str__


class Surrogate(ValueError):
    def __str__(self):
        return "\ud800\0 no text"


def circle():
    first, second = KeyError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    return first


def of_itself():
    error = ValueError("of itself")
    error.__cause__ = error.__context__ = error
    return error


MAKERS = [
    Frozen,
    Unprintable,
    NoNotes,
    NoLinks,
    Slotted,
    Stop,
    lambda: Mismatch(1, 2),
    lambda: Late(worker=1),
    Surrogate,
    circle,
    of_itself,
]
IDS = ["frozen", "unprintable", "no notes", "no links", "slotted", "of another kind"]
IDS += ["mismatch", "late", "surrogate", "circle", "of itself"]
errors = pytest.mark.parametrize("make", MAKERS, ids=IDS)


@contextlib.contextmanager
def coming_out(*expected):
    """Expect one of these exception objects; pytest.raises would print or annotate them."""
    try:
        yield
    except BaseException as error:
        came = error
    else:
        came = None
    assert any(came is one for one in expected), user_errors.describe(came)


def here():
    return dv.get_replica_context()


def rank():
    return here().replica_id_in_sync_group


@pytest.fixture(params=[1, 2, 3])
def strategy(request):
    with dv.MirroredStrategy([f"cpu:{k}" for k in range(request.param)]) as made:
        yield made


COLLECTIVES = {
    "barrier": lambda _: here().barrier(),
    "merge_call": lambda fail: here().merge_call(fail),
    "async": lambda _: here().all_reduce_async("sum", 1.0).wait(),
}


@errors
@pytest.mark.parametrize("who", ["first", "last", "all"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_exceptions_leave_a_step_unchanged(strategy, make, who, collective):
    last = strategy.num_replicas_in_sync - 1
    made = [make() for _ in range(last + 1)]

    def step():
        if collective == "merge_call":
            return here().merge_call(fail)
        if who == "all" or rank() == {"first": 0, "last": last}[who]:
            raise made[rank()]
        return COLLECTIVES[collective](None)

    def fail(_):
        raise made[0]

    index = {"first": 0, "last": last, "all": 0}[who] if collective != "merge_call" else 0
    with coming_out(made[index]):
        strategy.run(step)
    assert strategy.run(lambda: here().all_reduce("sum", 1))[last] == last + 1


@errors
def test_exceptions_leave_a_traced_step_in_debug_mode_unchanged(strategy, make, tmp_path, caplog):
    made = [make() for _ in range(strategy.num_replicas_in_sync)]

    @tracing.span("doomed", "test")
    def step():
        raise made[rank()]

    caplog.set_level(logging.DEBUG, "dvkernels")
    with dv.profiler.trace(tmp_path / "trace.json"), coming_out(made[0]):
        strategy.run(step)
    with dv.debug(), coming_out(made[0]):
        strategy.run(step)
    assert f"failed with {type(made[0]).__name__}" in caplog.text


@errors
def test_exceptions_leave_other_entry_points_unchanged(strategy, make):
    made = make()

    def fail(*_):
        raise made

    with strategy.scope():
        with coming_out(made):
            dv.Variable(fail)
        variable = dv.Variable([1.0], aggregation="sum")
        with coming_out(made):
            strategy.update(variable, fail)
        with coming_out(made):
            strategy.distribute_values_from_function(fail)
        with coming_out(made):
            strategy.distribute_datasets_from_function(fail)
    with coming_out(made), strategy.scope():
        fail()


@pytest.mark.parametrize("make", MAKERS[:5] + MAKERS[6:], ids=IDS[:5] + IDS[6:])
@pytest.mark.parametrize(
    "pipeline",
    [
        lambda data, fail: data.map(fail).batch(2),
        lambda data, fail: data.map(fail, num_workers=2).batch(2),
        lambda data, fail: data.filter(fail).batch(2),
        lambda data, fail: data.map(fail).prefetch(2),
        lambda data, fail: data.map(fail).shuffle(seed=1).repeat(2),
    ],
    ids=["map", "workers", "filter", "prefetch", "shuffle"],
)
def test_exceptions_leave_a_dataset_unchanged(make, pipeline):
    made = make()

    def fail(x):
        if x == 2:
            raise made
        return x

    with coming_out(made):
        list(pipeline(dv.Dataset.range(4), fail))
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy, coming_out(made):
        list(strategy.distribute_dataset(dv.Dataset.range(4).map(fail).batch(2)))


@errors
def test_the_other_workers_receive_the_error_text(make):
    made = make()
    carried = transports(2, timeout_seconds=5)
    workers = [WorkerGroup(transport) for transport in carried]
    workers[1].announce(made)
    (error,) = at_once(workers[0].barrier)
    assert isinstance(error, CollectiveMismatchError), error
    assert f"worker 1 raised {type(made).__name__}" in str(error)
    for _ in range(2):  # all workers are synchronized again
        for found in at_once(*[worker.barrier for worker in workers]):
            assert found is None or "worker 1 raised" in str(found)
    assert at_once(*[worker.barrier for worker in workers]) == [None, None]


@errors
def test_the_other_workers_receive_the_text_of_an_error_during_a_collective(make, monkeypatch):
    made = make()
    workers = [WorkerGroup(transport) for transport in transports(2, timeout_seconds=5)]

    def fail(*_):
        raise made

    monkeypatch.setattr(workers[1].transport, "_round", fail)
    with coming_out(made):
        workers[1].barrier()
    (error,) = at_once(workers[0].barrier)
    assert isinstance(error, WorkerLostError | CollectiveTimeoutError)
    assert "half-way" in str(error)


@errors
def test_added_notes_are_printed(make):
    made = make()
    user_errors.annotate(made, "a note")
    user_errors.annotate(made, "a note")
    assert user_errors.describe(made).startswith(type(made).__name__)
    if type(made) is not NoLinks:
        assert "".join(traceback.format_exception(made)).count("a note") <= 1
    if type(made) is Frozen:
        assert made.__notes__ == ["a note"]
    assert not user_errors.is_caused_by(made, [ValueError()])
    assert user_errors.is_caused_by(made, [made])


def test_a_block_never_suppresses_an_exception():
    @user_errors.context_manager
    def block(ended):
        try:
            yield "given"
        finally:
            ended.append(1)

    ended = []
    with block(ended) as given:
        assert given == "given"
    for error in (Frozen(), StopIteration(1), GeneratorExit(), KeyboardInterrupt()):
        with coming_out(error), block(ended):
            raise error
    assert len(ended) == 5

    @block(ended)
    def decorated(x):
        return x

    assert [decorated(1), decorated(2)] == [1, 2]
    assert len(ended) == 7


# -- values whose repr fails -----------------------------------------------------------------------


class Weird:
    def __repr__(self):
        raise ZeroDivisionError("in __repr__")


class NoArray(Weird):
    def __array__(self, *_, **__):
        raise Untold


class Untold(TypeError):
    __str__ = Unprintable.__str__


class Odd(dict):
    __repr__ = Weird.__repr__


@pytest.mark.parametrize(
    "call",
    [
        lambda s, v: v.assign(NoArray()),
        lambda s, v: dv.Variable(NoArray()),
        lambda s, v: dv.sync([Weird()], "sum"),
        lambda s, v: v.scatter_add(np.array([Weird()]), [1.0]),
        lambda s, v: s.run(lambda: here().all_reduce("sum", NoArray())),
        lambda s, v: s.run(lambda: here().all_reduce("sum", Weird())),
        lambda s, v: s.batch_reduce_to("sum", [Weird()]),
        lambda s, v: s.empty([Weird()]),
        lambda s, v: dv.MultiWorkerMirroredStrategy(Weird()),
        lambda s, v: dv.Dataset.from_arrays(Weird()),
        lambda s, v: dv.Dataset.from_arrays(NoArray()),
        lambda s, v: dv.Dataset.from_files(Weird(), list),
        lambda s, v: dv.Dataset.from_files([Weird()], list),
        lambda s, v: dv.Dataset.range(3).map(Weird()),
        lambda s, v: list(dv.Dataset.from_iterable(lambda: [Weird(), Weird()]).batch(2)),
        lambda s, v: dv.optimizers.SGD(0.1).load_state_dict(Odd()),
        lambda s, v: dv.optimizers.SGD(0.1).apply_gradients([Weird()]),
        lambda s, v: dv.CustomReduction(Weird(), 0, "odd"),
        lambda s, v: dv.CheckpointManager(Weird(), "nowhere"),
        lambda s, v: dv.Checkpoint(odd=Weird()).save("/nowhere/at/all"),
    ],
)
def test_bad_input_raises_an_error_of_the_library(call):
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        with strategy.scope():
            variable = dv.Variable([1.0, 2.0], aggregation="sum")
        with pytest.raises(
            (DvKernelsError, TypeError, ValueError, DatasetError, CheckpointError)
        ) as caught:
            call(strategy, variable)
        said = str(caught.value)
        assert any(name in said for name in ("whose repr fails", "Weird", "NoArray")), said
