"""The probe leaves data as they are, ratios are taken by round, and inputs stay off zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dvkernels.benchmarks import cases, gradients
from dvkernels.benchmarks.probe import Probe
from dvkernels.benchmarks.stopwatch import Samples, alternate, ratio, timed


def test_the_probe_in_place_changes_no_bit():
    arrays = [np.random.default_rng(k).standard_normal(10_007) for k in range(3)]
    before = [array.tobytes() for array in arrays]
    assert Probe(arrays, [], 2 * 3 * arrays[0].nbytes).seconds(2) > 0
    assert [array.tobytes() for array in arrays] == before


def test_the_probe_overwrites_targets_only():
    source, target = np.ones(1000), np.ones(1000)
    guard = np.ones(3000)
    assert Probe([source], [target, guard[1000:2000]], 3 * source.nbytes).seconds(1) > 0
    assert (source == 1).all()
    assert (guard[:1000] == 1).all()
    assert (guard[2000:] == 1).all()
    assert (target != 1).any()


def test_less_than_a_word_takes_no_time():
    assert Probe([np.ones(1, "i1")], [], 2).seconds(1) == 0


def test_timers_run_in_turn_and_ratios_are_taken_by_round():
    order = []

    def timer(name, seconds):
        times = iter(seconds)

        def measure():
            order.append(name)
            return next(times)

        return measure

    found = alternate({"a": timer("a", [1, 2, 30]), "b": timer("b", [2, 4, 30])}, 3)
    assert order == ["a", "b"] * 3
    assert ratio(found["a"], found["b"]) == 0.5
    assert Samples((3.0, 1.0, 2.0)).median == 2
    assert Samples((1.0, 2.0, 3.0)).quartiles == (1.5, 2.5)


def test_inputs_are_renewed_before_an_untimed_call():
    calls = []
    timed(lambda: calls.append("call"), 5, lambda: calls.append("renew"), most_repeats=3)
    assert calls == [*["renew", "call", "call", "call"] * 2, "renew", "call", "call"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int64"])
@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_sums_in_place_never_reach_zero_or_infinity(dtype, replicas):
    case = cases.case("all_reduce", 4096, dtype, "sum", replicas, "auto")
    buffers = case.steady_buffers(0)
    total = np.sum([buffer.astype("f8") for buffer in buffers], axis=0)
    assert (np.array(buffers[0].astype("f8")) != 0).all()
    largest = np.abs(total).max() * float(replicas) ** (case.most_repeats - 1)
    if np.dtype(case.dtype).kind in "iu":
        bits = 8 * case.dtype.itemsize
        assert (case.most_repeats - 1) * math.log2(replicas) < bits
    else:
        limit = {"float16": 65504.0, "float64": 1e308}.get(dtype, 3e38)
        assert largest < limit


def test_a_resnet_50_has_161_arrays():
    shapes = gradients.resnet_50_shapes()
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
