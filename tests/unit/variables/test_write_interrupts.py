"""An interrupt at any point of a write or deep copy leaves equal copies and a free step lock."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading

import numpy as np
import pytest
from kinds import only_cpu

import dvkernels as dv


def interrupted_at(point, act):
    """Call ``act`` with an interrupt at the n-th call or return; return whether it was raised."""
    count = itertools.count()

    def hook(frame, event, argument):
        if event in ("call", "c_return") and next(count) == point:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(hook)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def another_thread_gets_its_turn(strategy, variable):
    done = []
    thread = threading.Thread(target=lambda: done.append(copy.deepcopy(variable)))
    thread.start()
    thread.join(10)
    assert done, "the turn was not given back"
    strategy.run(lambda: None)


@only_cpu
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in finalizers
@pytest.mark.parametrize("verb", ["deepcopy", "adam", "adam in turn", "assign_add", "load"])
def test_interrupts_at_every_point(verb):
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        with strategy.scope():
            pair = [dv.Variable(np.ones(3), name=name) for name in "ab"]
        adam = dv.optimizers.Adam(0.1)
        adam.apply_gradients([(np.ones(3), pair[0])])
        state = adam.state_dict()
        acts = {
            "deepcopy": lambda: copy.deepcopy((pair, adam)),
            "adam": lambda: adam.apply_gradients([(np.ones(3), v) for v in pair]),
            "adam in turn": lambda: strategy.run(
                lambda: adam.apply_gradients([(np.ones(3), v) for v in pair], weight=1)
            ),
            "assign_add": lambda: pair[0].assign_add(np.ones(3)),
            "load": lambda: adam.load_state_dict(state),
        }
        for point in itertools.count():
            was_interrupted = interrupted_at(point, acts[verb])
            for variable in (*pair, *(slot for v in adam.slotted for slot in adam.slots(v))):
                first, second = variable.values
                np.testing.assert_array_equal(first, second)
            if verb in ("deepcopy", "adam in turn"):
                another_thread_gets_its_turn(strategy, pair[0])
            if not was_interrupted:
                break
        assert point > 20
        adam.apply_gradients([(np.ones(3), v) for v in pair])
    gc.collect()  # so that finalizers that were interrupted are this test's
