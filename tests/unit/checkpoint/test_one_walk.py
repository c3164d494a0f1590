"""A save or a restore walks the user's tree once: it visits no object twice."""

from __future__ import annotations

import collections
import sys
from typing import ClassVar

import numpy as np
import optree
import pytest

import dvkernels as dv
from dvkernels import checkpoint

ROOM = checkpoint.__path__[0]


class Counting(list):
    """Container that counts the visits to it, all of them in one Counter."""

    visits: ClassVar = collections.Counter()

    def flattened(self):
        Counting.visits[id(self)] += 1
        return tuple(self), None, range(len(self))


optree.register_pytree_node(
    Counting,
    Counting.flattened,
    lambda _, children: Counting(children),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


class State:
    """Object with a state, which counts its reads."""

    def __init__(self):
        self.reads = 0

    def state_dict(self):
        self.reads += 1
        return {"numbers": [1, 2], "x": np.zeros(2)}

    def load_state_dict(self, state):
        pass


def objects_of(state):
    shared = Counting([dv.Variable(0.0), [1, (2, 3)]])
    inner = Counting([{"a": Counting([state, shared]), "b": {"c": [1, 2]}}, shared, 5])
    return {"first": inner, "second": shared, "third": [Counting([]), np.zeros(3)]}


VERBS = {
    "save": lambda manager: manager.save(2),
    "background": lambda manager: (manager.save(2, background=True), manager.close()),
    "restore": lambda manager: manager.restore(1),
    "restore_latest": lambda manager: manager.restore_latest(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_container_is_opened_once_and_each_state_is_read_once(tmp_path, verb):
    state = State()
    manager = dv.CheckpointManager(dv.Checkpoint(**objects_of(state)), tmp_path)
    manager.save(1)
    Counting.visits.clear()
    state.reads = 0
    VERBS[verb](manager)
    assert sorted(Counting.visits.values()) == [1] * 4
    assert state.reads == 1


def num_calls(act):
    """Return the number of calls of functions of the checkpoint room, and of deep copies."""
    counts = collections.Counter()

    def on_event(frame, event, arg):
        name = frame.f_code.co_filename
        if event == "call" and (name.startswith(ROOM) or frame.f_code.co_name == "deepcopy"):
            counts[frame.f_code.co_name] += 1

    sys.setprofile(on_event)
    try:
        act()
    finally:
        sys.setprofile(None)
    assert not counts["deepcopy"], "plain data is copied by its encoding"
    return counts.total()


def nest(depth, bottom):
    for k in range(depth):
        bottom = {"data": list(range(k % 5)), "below": [bottom]}
    return bottom


@pytest.mark.parametrize("bottom", [np.zeros(1), 1], ids=["an array", "plain data"])
@pytest.mark.parametrize("verb", VERBS)
def test_calls_are_in_proportion_to_the_objects(tmp_path, verb, bottom):
    calls = []
    for depth in (0, 15, 30, 45):
        data = {"x": nest(depth, bottom), "y": nest(depth, bottom)}
        manager = dv.CheckpointManager(dv.Checkpoint(**data), tmp_path / str(depth))
        manager.save(1)
        calls.append(num_calls(lambda manager=manager: VERBS[verb](manager)))
    steps = np.diff(calls)
    assert steps.max() <= 1.05 * steps.min(), calls
