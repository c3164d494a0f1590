"""An action succeeds on all workers or fails on all of them, by errors of one class."""

from __future__ import annotations

import itertools

import pytest

from dvkernels.communicators.workers.atomic_commit import first_difference, results_of_all


class Worst(Exception):
    pass


class Bad(Exception):
    pass


def outcome_on(worker, acts):
    """Return the results, or the error, of one worker; ``acts`` has the act of each."""

    def all_gather(own):
        return [own if k == worker else reported(act) for k, act in enumerate(acts)]

    try:
        return results_of_all(all_gather, acts[worker], (Worst, Bad), "worker {}: {}".format)
    except Exception as error:
        return error


def reported(act):
    """Return what a worker sends to the others."""
    sent = []

    def send(own):
        sent.append(own)
        return []

    results_of_all(send, act, (Worst, Bad), str)
    return sent[0]


def act_of(kind):
    def act():
        if kind is not None:
            raise kind("why")
        return "result"

    return act


@pytest.mark.parametrize("kinds", list(itertools.product([None, Worst, Bad, KeyError], repeat=3)))
def test_all_succeed_or_all_raise_one_class(kinds):
    acts = [act_of(kind) for kind in kinds]
    found = [outcome_on(worker, acts) for worker in range(3)]
    failed = [worker for worker in range(3) if kinds[worker] is not None]
    if not failed:
        assert found == [["result"] * 3] * 3
        return
    first = Worst if kinds[failed[0]] is Worst else Bad
    for worker, error in enumerate(found):
        own = Worst if kinds[worker] is Worst else Bad
        if worker in failed and own is first:
            assert type(error) is kinds[worker]
            assert error.args == ("why",)
        else:
            name = kinds[failed[0]].__name__
            assert type(error) is first
            assert str(error).startswith(f"worker {failed[0]}: {name}: ")


def test_the_first_difference_is_that_of_the_first_name():
    assert first_difference([{"a": 1, "b": 2}] * 3, None) is None
    assert first_difference([{"a": 1, "b": 2}, {"b": 3}], "none") == ("a", [1, "none"])
    assert first_difference([{}, {"b": 3}], "none") == ("b", ["none", 3])
