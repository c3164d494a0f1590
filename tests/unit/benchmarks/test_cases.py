"""Every wrong element is found, and no right one; what is timed stays finite."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dvkernels import kernels
from dvkernels.benchmarks import cases, inputs
from dvkernels.benchmarks.cases import COLLECTIVES, Arrays, Case, Trial
from dvkernels.benchmarks.failures import BenchmarkError
from dvkernels.benchmarks.peers import numpy_loop

DTYPES = [
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("int8", "uint16", "int32", "uint64"),
    ml_dtypes.bfloat16,
]


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_each_wrong_element_is_counted_once(collective, num_replicas, count, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK", 5)  # many edges
    case = Case(collective, count, np.dtype(np.float32), "sum", num_replicas)
    for way in (numpy_loop.call, cases.ours):
        arrays = Arrays(case)
        call = way(arrays)
        assert Trial(arrays, call).num_wrong() == 0
        elements = [
            (result, k) for result in arrays.out or arrays.buffers for k in range(len(result))
        ]
        for wrong, (result, k) in enumerate(elements, start=1):
            result[k] = np.nan if wrong % 2 else result[k] * 2
            assert arrays.num_wrong() == wrong
        assert Trial(arrays, lambda: None).num_wrong() > 0 or num_replicas == 1 or count == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
@pytest.mark.parametrize("num_replicas", [2, 4, 7])
def test_any_order_is_right_and_nothing_overflows(dtype, op, num_replicas):
    case = Case("all_reduce", 1000, np.dtype(dtype), op, num_replicas)
    if (op == "mean" and case.dtype.kind in "iu") or (
        op in ("min", "max") and case.dtype.kind == "c"
    ):
        return
    arrays = Arrays(case)
    call = numpy_loop.call(arrays)
    trial = Trial(arrays, call)

    def backwards():
        arrays.buffers.reverse()
        call()
        arrays.buffers.reverse()

    if case.dtype.name != "bfloat16" or num_replicas == 2:  # NumPy rounds after every step
        assert trial.num_wrong() == 0
        assert Trial(arrays, backwards).num_wrong() == 0
    for _ in range(3):
        trial.run(trial.max_calls or 50)
        for buffer in arrays.buffers:
            assert np.isfinite(buffer.astype(complex)).all()
            assert np.count_nonzero(buffer)


def test_inputs_are_a_function_of_seed_and_replica():
    def filled(seed, replica, length=inputs.CHUNK + 3):
        buffer = np.empty(length, np.float32)
        inputs.fill(buffer, "sum", seed, replica)
        return buffer.tobytes()

    assert filled(0, 0) == filled(0, 0)
    assert len({filled(seed, replica) for seed in (0, 1) for replica in (0, 1)}) == 4


def test_what_must_move():
    def moved(name):
        return Case(name, 1000, np.dtype(np.int8), num_replicas=4).moved_bytes

    assert {name: moved(name) for name in COLLECTIVES} == {
        "all_reduce": 8000,
        "broadcast": 4000,
        "reduce": 5000,
        "reduce_scatter": 5000,
        "all_gather": 20000,
        "all_to_all": 8000,
    }


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.delattr(kernels, "broadcast")
    with pytest.raises(BenchmarkError, match="broadcast"):
        cases.ours(Arrays(Case("broadcast", 1, np.dtype(np.int8))))
