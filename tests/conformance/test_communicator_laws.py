"""Every communicator keeps the laws of the package, and the laws find what breaks them."""

from __future__ import annotations

import numpy as np
import pytest

from dvkernels.communicators.bucketing import Bucketing
from dvkernels.communicators.local import Local
from dvkernels.communicators.single import Single
from dvkernels.testing import check_communicator

LOCAL = {name: lambda size, name=name: Local(size, name) for name in ("auto", "direct", "ring")}


@pytest.mark.parametrize("algorithm", LOCAL)
def test_local(algorithm):
    check_communicator(LOCAL[algorithm])


def test_single():
    check_communicator(lambda size: Single(), sizes=[1])


def test_bucketing():
    check_communicator(lambda size: Bucketing(Local(size, "auto"), 1000))


def defect(**methods):
    verbs = {name: verb for name, verb in vars(Local).items() if not name.startswith("__")}

    def make(size):
        wrong = type("Wrong", (), {**verbs, **methods})()
        wrong.size, wrong.algorithm = size, "auto"
        return wrong

    return make


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"all_reduce": lambda self, values, op, out=None: list(values)}, "all_reduce"),
        ({"broadcast": lambda self, values, root: [values[root]] * self.size}, "shares memory"),
        ({"all_gather": lambda self, values, axis: [np.concatenate(values, 0)] * 2}, "all_gather"),
        ({"reduce": lambda self, values, op: values[0].astype(np.float64)}, "reduce"),
        ({"reduce_scatter": None}, "lacks methods|reduce_scatter"),
    ],
)
def test_a_defect_is_found(methods, message):
    with pytest.raises((AssertionError, TypeError), match=message):
        check_communicator(defect(**methods), sizes=[2])
