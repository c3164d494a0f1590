"""Kernels on a real GPU (``pytest -m gpu``): the tests of the CPU, streams, graphs, memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from kinds import BODIES, check_body

import dvkernels as dv
from dvkernels import errors, kernels
from dvkernels.devices import cuda
from dvkernels.testing import check_arrays

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cuda.is_simulated() or bool(cuda.missing()), reason=cuda.missing() or "it is the simulator"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_the_tests_of_the_cpu_pass(body):
    check_body(body, "cupy", 600)


def test_the_array_library_of_cupy():
    check_arrays(cuda.arrays())


@pytest.mark.parametrize("visible", ["", "0"])
def test_visible_devices(visible):
    code = "import dvkernels as dv; print(len(dv.list_devices('cuda')))"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.strip() == str(len(visible))


def filled(cupy, length, count=2):
    return [cupy.full(length, k + 1, "f4") for k in range(count)]


def test_streams_of_arrays_are_ordered_before_and_after_the_call():
    import cupy

    length = 1 << 24
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    buffers = filled(cupy, length)
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        for buffer, stream in zip(buffers, streams, strict=True):
            with stream:  # slow work, right before: it must be awaited
                for _ in range(8):
                    buffer += 1
        kernels.cuda.all_reduce(buffers, stream=streams)
        for buffer, stream in zip(buffers, streams, strict=True):
            with stream:  # and this comes after
                buffer *= 0.25
    cupy.cuda.Device().synchronize()
    expected = [1.0, 2.0]
    for _ in range(20):
        total = np.float32(sum(np.float32(one + 8) for one in expected))
        expected = [np.float32(total * np.float32(0.25))] * 2
    for buffer in buffers:
        assert (buffer == expected[0]).all()


def test_a_captured_graph_replays_the_call():
    import cupy

    buffers = filled(cupy, 1000)
    kernels.all_reduce(buffers)  # compiled before the capture
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # such a stream does not wait for the default one
    with stream:
        stream.begin_capture()
        kernels.all_reduce(buffers)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
    stream.synchronize()
    assert (buffers[0] == 3 * 2**3).all()


def test_tables_too_long_to_be_arguments():
    import cupy

    groups = [filled(cupy, 100 + k, 3) for k in range(200)]
    for turn in range(3):
        kernels.all_reduce_many(groups)
        assert all((one == 6 * 3**turn).all() for group in groups for one in group)


def test_memory_goes_back_to_the_pool():
    import cupy

    buffers = filled(cupy, 1 << 20)
    kernels.all_gather(buffers)
    pool = cupy.get_default_memory_pool()
    gc.collect()  # of earlier tests
    before = pool.used_bytes()
    for _ in range(5):
        kernels.all_gather(buffers)
        kernels.reduce(buffers)
    assert pool.used_bytes() == before


def test_out_of_memory_is_reported_and_leaks_nothing():
    import cupy

    pool = cupy.get_default_memory_pool()
    buffers = filled(cupy, 1 << 20)
    gc.collect()
    pool.free_all_blocks()  # of earlier tests, which would serve the results
    before, limit = pool.used_bytes(), pool.get_limit()
    pool.set_limit(size=pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(errors.DeviceError, match="no room"):
            kernels.all_gather(buffers * 8)
    finally:
        pool.set_limit(size=limit)
    gc.collect()  # the error's traceback
    assert pool.used_bytes() == before
    assert (kernels.reduce(buffers) == 3).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "int8"])
def test_results_of_tensors_are_tensors_of_their_dtype(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensors = [
        torch.full((3, 5), k + 1, dtype=getattr(torch, dtype), device="cuda") for k in (0, 1)
    ]
    for result in (*kernels.all_gather(tensors), kernels.reduce(tensors)):
        assert isinstance(result, torch.Tensor)
        assert result.dtype == tensors[0].dtype
        assert result.is_cuda
    kernels.all_reduce(tensors)
    assert all((tensor == 3).all() for tensor in tensors)


def test_repeated_calls_use_their_own_arrays():
    import cupy

    kept = []
    for turn in range(200):
        kept.append(filled(cupy, 1024))
        out = [cupy.empty(1024, "f4") for _ in range(2)]
        kernels.all_reduce(kept[-1], out=out)
        kernels.all_reduce(kept[-1], "max")
        assert all((one == 3).all() for one in out), turn
    assert all((one == 2).all() for pair in kept for one in pair)


def test_a_reduction_that_calls_other_functions():
    import cupy
    import numba

    size = numba.njit(lambda x: x if x >= 0 else -x)
    op = dv.CustomReduction(numba.njit(lambda a, b: a if size(a) >= size(b) else b), 0, "farther")
    buffers = [cupy.asarray(np.float32([1, -5, 2])), cupy.asarray(np.float32([-3, 2, 1]))]
    assert kernels.reduce(buffers, op).tolist() == [-3, -5, 2]


FORKING = """
import os, cupy
from dvkernels import errors, kernels

buffers = [cupy.ones(8, "f4"), cupy.ones(8, "f4")]
kernels.all_reduce(buffers)
child = os.fork()
if child == 0:
    try:
        kernels.all_reduce(buffers)
    except errors.DeviceError as error:
        print(error, flush=True)
    finally:
        os._exit(0)
os.waitpid(child, 0)
assert (buffers[0] == 2).all()
"""


def test_a_forked_child_gets_an_error():
    ended = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "forked" in ended.stdout


def test_arrays_of_numba():
    from numba import cuda as numba_cuda

    arrays = [numba_cuda.to_device(np.full(7, k + 1.0)) for k in range(3)]
    kernels.all_reduce(arrays)
    assert all((array.copy_to_host() == 6).all() for array in arrays)
    assert type(kernels.reduce(arrays)) is type(arrays[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_jax(dtype):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no CUDA")
    slow = jax.jit(lambda x: ((x @ x) * 0 + 1).astype(dtype))  # is not there when it returns
    for _ in range(10):
        made = [slow(jax.numpy.full((2000, 2000), k + 1.0)) for k in range(2)]
        total, *gathered = kernels.reduce(made), *kernels.all_gather(made)
        del made
        for result, right in zip([total, *gathered], [2, 1, 1], strict=True):
            assert isinstance(result, jax.Array)
            assert result.dtype == dtype
            assert (result == right).all()
