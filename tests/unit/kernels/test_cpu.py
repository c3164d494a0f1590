"""Kernels of the CPU: values, layouts, threads, interrupts, forks and compilation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import fork_server
import ml_dtypes
import numpy as np
import pytest

import dvkernels as dv
from dvkernels import kernels, reduce_op
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cpu.engine import recipe, thread_pool

REDUCERS = [kernels.direct_all_reduce, kernels.ring_all_reduce]
_COMBINE = {
    "sum": np.add,
    "mean": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "prod": np.multiply,
}


class Exchanged:
    """An array of a library that supports DLPack only."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def _expected(buffers: list[Any], op: str) -> Any:
    total = buffers[0].copy()
    for buffer in buffers[1:]:
        total = _COMBINE[op](total, buffer)
    return total / total.dtype.type(len(buffers)) if op == "mean" else total


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        *((dtype, op) for dtype in ("f4", "f8") for op in _COMBINE),
        *((dtype, op) for dtype in ("i1", "u2", "i8") for op in ("sum", "prod", "max")),
        ("u1", "sum"), ("u8", "min"), ("?", "min"), ("?", "max"),
    ],
)  # fmt: skip
def test_ops_agree_with_numpy(reducer: Any, dtype: str, op: str) -> None:
    rng = np.random.default_rng(7)
    # Whole numbers: floating-point sums and products of three of them are exact in any order.
    buffers = [rng.integers(0, 90, 333).astype(dtype) for _ in range(3)]
    expected = _expected(buffers, op)
    results = reducer(buffers, op)
    assert all(result is buffer for result, buffer in zip(results, buffers, strict=True))
    for buffer in buffers:
        np.testing.assert_array_equal(buffer, expected)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_propagates(reducer: Any, op: str) -> None:
    buffers = [np.full(40, float(k)) for k in range(3)]
    for k in range(3):
        buffers[k][k * 13] = np.nan
    expected = _expected(buffers, op)
    reducer(buffers, op)
    for buffer in buffers:
        np.testing.assert_array_equal(buffer, expected)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_out_leaves_the_inputs(reducer: Any) -> None:
    for count in (1, 3):
        buffers = [np.arange(5.0) + k for k in range(count)]
        before = [buffer.copy() for buffer in buffers]
        for buffer in buffers:
            buffer.flags.writeable = False
        out = [np.empty(5) for _ in buffers]
        results = reducer(buffers, out=out)
        for result, target in zip(results, out, strict=True):
            assert result is target
            np.testing.assert_array_equal(target, sum(before))
        np.testing.assert_array_equal(buffers, before)


def test_reduce_returns_a_new_array() -> None:
    only = np.arange(3.0)
    result = kernels.reduce([only])
    assert not np.shares_memory(result, only)
    twice = kernels.aggregate_sum([only, only])
    np.testing.assert_array_equal(twice, [0, 2, 4])
    np.testing.assert_array_equal(kernels.aggregate_mean([only, twice]), [0, 1.5, 3])


@pytest.mark.parametrize("dtype", ["f2", "c16", "?", "U3", "M8[s]", "i4,f8"])
def test_broadcast_moves_any_bytes(dtype: str) -> None:
    buffers = [np.zeros(77, dtype) for _ in range(3)]
    buffers[1][:] = np.ones(77, "i8").astype(buffers[1].dtype)
    kernels.broadcast(buffers, 1)
    assert buffers[0].tobytes() == buffers[1].tobytes() == buffers[2].tobytes()
    assert any(buffers[0].tobytes())


@pytest.mark.parametrize("reducer", [*REDUCERS, kernels.broadcast])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.reshape(2, 3, 4).T,
        lambda a: a.reshape(2, 3, 4).transpose(1, 0, 2),
        lambda a: a[::2],
        lambda a: a[::-1],
        lambda a: a[:1].reshape(()),
        lambda a: a[:0],
        lambda a: a.reshape(4, 6)[:, 1:5],
        lambda a: np.frombuffer(bytearray(193), "i1")[1:].view("f8"),  # not aligned
    ],
)
def test_layouts(reducer: Any, view: Any) -> None:
    views = [view(np.arange(24.0) + k) for k in range(3)]
    expected = views[0].copy() if reducer is kernels.broadcast else sum(v.copy() for v in views)
    reducer(views)
    for result in views:
        np.testing.assert_array_equal(result, expected)


def test_mixed_layouts() -> None:
    a, b = np.arange(12.0).reshape(3, 4), np.asfortranarray(np.ones((3, 4)))
    kernels.all_reduce([a, b])
    np.testing.assert_array_equal(a, np.arange(12.0).reshape(3, 4) + 1)
    np.testing.assert_array_equal(a, b)


def test_dlpack_objects_are_written_and_returned() -> None:
    arrays = [np.arange(4.0), np.ones(4)]
    exchanged = [Exchanged(array) for array in arrays]
    results = kernels.all_reduce(exchanged)
    assert [id(result) for result in results] == [id(buffer) for buffer in exchanged]
    np.testing.assert_array_equal(arrays[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(arrays[1], [1, 2, 3, 4])


@pytest.mark.parametrize("reducer", REDUCERS)
def test_bits_do_not_depend_on_threads(reducer: Any) -> None:
    code = f"""
        import hashlib
        import numpy as np
        from dvkernels import kernels
        rng = np.random.default_rng(1)
        buffers = [rng.standard_normal(300_001).astype("f4") for _ in range(5)]
        kernels.{reducer.__name__}(buffers)
        print({{hashlib.sha256(buffer).hexdigest() for buffer in buffers}})
    """
    results = {_forked(code, DVKERNELS_NUM_THREADS=str(count)) for count in (1, 2, 5)}
    assert len(results) == 1


@pytest.mark.parametrize("length", [0, 1, 1000, 300_001])
@pytest.mark.parametrize(("op", "dtype"), [("sum", "f4"), ("mean", "f8"), ("sum", "c8")])
def test_fast_path_and_slow_path_give_the_same_bits(
    op: str, dtype: str, length: int, monkeypatch: Any
) -> None:
    rng = np.random.default_rng(2)
    buffers = [rng.standard_normal(2 * length).astype("f4").view(dtype) for _ in range(3)]
    slow, fast = ([array.copy() for array in buffers] for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "recipes", {})
        kernels.all_reduce(slow, op)
    kernels.all_reduce([array.copy() for array in buffers], op)  # enables the fast path
    assert (op, np.dtype(dtype)) in recipe.recipes
    kernels.all_reduce(fast, op)
    assert [a.tobytes() for a in fast] == [a.tobytes() for a in slow]


def test_two_callers_progress_together() -> None:
    large = [np.ones(1 << 24, "f4") for _ in range(2)]
    small = [np.ones(16, "f4") for _ in range(2)]
    kernels.all_reduce(small)  # compiled
    finished = threading.Event()

    def run_large() -> None:
        for _ in range(10):
            kernels.all_reduce(large, "mean")
        finished.set()

    kernels.all_reduce(small, "mean")
    thread = threading.Thread(target=run_large)
    thread.start()
    num_small = 0
    while not finished.is_set():
        kernels.all_reduce(small, "mean")
        num_small += not finished.is_set()
    thread.join()
    assert num_small > 50
    assert (large[1] == 1).all()


@pytest.mark.skipif(thread_pool.num_threads() < 2, reason="needs a helper thread")
def test_an_interrupt_right_after_the_compiled_code_waits_for_the_helpers(monkeypatch) -> None:
    def interrupted(pool: int, job: int, num_pauses: int) -> int:
        occupied.append(real(pool, job, 1))  # one spin: a helper is often still inside
        raise KeyboardInterrupt

    real, occupied = thread_pool._execute, []
    for group in ([np.ones(1 << 21, "f4") for _ in range(2)],
                  [np.ones((1 << 20, 3), "f4")[:, ::2] for _ in range(2)]):  # fmt: skip
        kernels.all_reduce(group)  # compiles
        monkeypatch.setattr(thread_pool, "_execute", interrupted)
        for _ in range(20):
            for buffer in group:
                buffer[...] = 1
            with pytest.raises(KeyboardInterrupt):
                kernels.all_reduce(group)
            values = {float(value) for buffer in group for value in np.unique(buffer)}
            assert values in ({1.0}, {2.0})
        monkeypatch.setattr(thread_pool, "_execute", real)
    assert any(occupied)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")
def test_an_interrupt_leaves_all_or_nothing() -> None:
    buffers = [np.ones(1 << 23, "f4") for _ in range(2)]
    staged = [np.ones((1 << 22, 2), "f4")[:, 0] for _ in range(2)]
    for group in (buffers, staged):
        kernels.all_reduce(group)  # compiles
        num_interrupted = 0
        for attempt in range(12):
            for buffer in group:
                buffer[:] = 1
            before = signal.getsignal(signal.SIGALRM)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + attempt * 4e-4)
                kernels.all_reduce(group)
                time.sleep(0.02)
            except KeyboardInterrupt:
                num_interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            values = {float(value) for buffer in group for value in np.unique(buffer)}
            assert values in ({1.0}, {2.0})
        assert num_interrupted == 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes() -> None:
    buffers = [np.ones(1 << 20, "f4") for _ in range(2)]
    kernels.all_reduce(buffers, "max")
    child = os.fork()
    if child == 0:
        kernels.all_reduce(buffers)
        os._exit(0 if (buffers[1] == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _forked(code: str, **environment: str) -> str:
    finished = fork_server.run(textwrap.dedent(code), **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def _python(code: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    return finished.stdout.strip()


def test_importing_the_kernels_does_not_import_numba() -> None:
    assert _python("import sys, dvkernels.kernels; print('numba' in sys.modules)") == "False"


def test_one_thread_needs_no_helper() -> None:
    code = """
        import threading
        import numpy as np
        from dvkernels import kernels
        buffers = [np.ones(1 << 20), np.ones(1 << 20)]
        kernels.all_reduce(buffers)
        names = [thread.name.rpartition("-")[0] for thread in threading.enumerate()]
        print(names.count("dvkernels-kernel"), buffers[1].sum() == 2 << 20)
    """
    assert _forked(code, DVKERNELS_NUM_THREADS="1") == "0 True"
    assert _forked(code, DVKERNELS_NUM_THREADS="3") == "2 True"


def test_few_specializations_serve_all_operations_and_dtypes() -> None:
    names = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"]
    names += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    served, keys = 0, set()
    for op in dv.ReduceOp:
        for name in names:
            dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
            try:
                reduce_op.check_dtype("test", op, dtype)
            except dv.errors.UnsupportedDTypeError:
                continue
            served += 1
            keys.add((arithmetic.operation_code(op), arithmetic.type_code(dtype, op)))
    assert served == 14 + 6 + 13 + 13 + 14
    assert len(keys) == 8 + 12 + 12 + 10  # sum and mean share one, signs share sums
