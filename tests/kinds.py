"""Kernels for tests written for NumPy arrays, adapted to every kind of array.

``DVKERNELS_TEST_KIND`` chooses: ``cpu`` passes NumPy arrays as they are; ``simulator`` passes
arrays of Numba's simulator over the same memory (NUMBA_ENABLE_CUDASIM=1 must be set too); ``cupy``
copies the memory behind the arrays to the GPU, with all strides and overlaps, and back.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvkernels.devices import array_memory as memory
from dvkernels.devices import interop

KIND = os.environ.get("DVKERNELS_TEST_KIND", "cpu")
# Tests that are written for NumPy arrays.
BODIES = (
    "tests/contract/test_contract_of_kernels.py",
    "tests/unit/kernels/test_custom.py",
    "tests/unit/kernels/test_optimizers.py",
    "tests/properties/test_kernels.py",
    "tests/properties/test_collectives.py",
    "tests/conformance/test_strategy_laws.py",
    "tests/unit/variables",
    "tests/contract/test_contract_of_variables.py",
    "tests/unit/optimizers",
    "tests/contract/test_contract_of_members.py",
    "tests/contract/test_contract_of_values.py",
    "tests/unit/strategies/test_async.py",
    "tests/unit/strategies/test_strategies.py",
    "tests/unit/test_context.py",
    "tests/contract/test_contract_of_contexts.py",
)


def check_body(body: str, kind: str, timeout: float, **environment: str) -> None:
    """Run tests in a process of their own, for another kind of array; fail unless they pass."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", body, "-p", "no:cacheprovider"],
        env={**os.environ, "DVKERNELS_TEST_KIND": kind, **environment},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert re.search(r"\d+ passed", child.stdout), child.stdout  # and not all skipped


only_cpu = pytest.mark.skipif(KIND != "cpu", reason=f"about the CPU, not about {KIND}")


def examples(count: int) -> int:
    """Return the number of examples that Hypothesis draws; ``count`` of them in ``.ci/run``.

    The simulator runs each element in Python, so it gets fewest.
    """
    if KIND == "simulator":
        return max(2, count // 6)
    return count if os.environ.get("DVKERNELS_TEST_EXAMPLES") == "all" else max(5, count // 3)


def daily(cases: Collection[Any], *chosen: Any) -> list[Any]:
    """Return parameters, of which all but the chosen ones are run by ``-m wide`` only."""
    assert set(chosen) <= {*cases}, "a chosen case is none of the cases"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=[] if case in chosen else pytest.mark.wide,
        )
        for case in cases
    ]


def smaller(length: int) -> int:
    """Return the greatest length to draw: the simulator works in pieces of 128 bytes."""
    return max(2, length // 32) if KIND == "simulator" else length


class _Simulator:
    """Kind of the simulator's arrays, which wrap NumPy arrays in host memory."""

    def __init__(self) -> None:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        self.kind = FakeCUDAArray

    def to_device(self, array: Any) -> Any:
        return self.kind(array)

    def to_host(self, array: Any) -> Any:
        return array._ary

    def copy_back(self) -> None:
        pass


class _CuPy:
    """Kind of CuPy's arrays: whole memories are copied, so that views keep sharing memory."""

    def __init__(self) -> None:
        import cupy

        self.cupy, self.kind = cupy, cupy.ndarray
        self.memories: dict[int, tuple[Any, Any]] = {}

    def to_device(self, array: Any) -> Any:
        low, high = np.lib.array_utils.byte_bounds(array)
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        start, stop = np.lib.array_utils.byte_bounds(base)
        start, stop = min(start, low), max(stop, high)
        if start not in self.memories:
            raw = np.ndarray(stop - start, np.uint8, _Bytes(start, stop))
            self.memories[start] = (raw, self.cupy.asarray(raw))
        memory = self.memories[start][1]
        pointer = memory.data + (array.__array_interface__["data"][0] - start)
        try:
            made = self.cupy.ndarray(array.shape, array.dtype, pointer, array.strides)
        except (TypeError, ValueError):  # CuPy has no such dtype
            return _Interface(array, pointer.ptr)
        return made if array.flags.writeable else _Interface(array, pointer.ptr)

    def to_host(self, array: Any) -> Any:
        return self.cupy.asnumpy(array)

    def copy_back(self) -> None:
        for raw, copied in self.memories.values():
            copied.get(out=raw)
        self.memories.clear()


class _Interface:
    """Array with only ``__cuda_array_interface__``: of any dtype, and maybe read-only."""

    def __init__(self, array: Any, address: int) -> None:
        self.dtype = array.dtype
        self.__cuda_array_interface__ = {
            "data": (address, not array.flags.writeable), "shape": array.shape,
            "strides": array.strides, "typestr": array.dtype.str, "version": 3, "stream": None,
        }  # fmt: skip


class _Bytes:
    """The bytes from one address of the host to another."""

    def __init__(self, start: int, stop: int) -> None:
        self.__array_interface__ = {
            "data": (start, False), "shape": (stop - start,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


class _Adapter:
    """Module of kernels whose functions take and return NumPy arrays, for another kind of array."""

    def __init__(self, module: str, kind: Any) -> None:
        self._module, self._kind = module, kind

    def __getattr__(self, name: str) -> Any:
        function = getattr(importlib.import_module(self._module), name)

        def call(*args: Any, **named: Any) -> Any:
            kind = self._kind()
            known: dict[int, tuple[Any, Any]] = {}
            sent = [self._to_kind(kind, known, value) for value in args]
            sent_named = {key: self._to_kind(kind, known, value) for key, value in named.items()}
            try:
                result = function(*sent, **sent_named)
            finally:
                kind.copy_back()
            return self._to_numpy(kind, {id(one): host for host, one in known.values()}, result)

        return call

    def _to_kind(self, kind: Any, known: Any, value: Any) -> Any:
        if type(value) is np.ndarray:
            if id(value) not in known:
                known[id(value)] = (value, kind.to_device(value))
            return known[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(self._to_kind(kind, known, one) for one in value)
        if isinstance(value, Iterator):
            return (self._to_kind(kind, known, one) for one in value)
        return value

    def _to_numpy(self, kind: Any, hosts: Any, value: Any) -> Any:
        if isinstance(value, kind.kind):
            return hosts[id(value)] if id(value) in hosts else kind.to_host(value)
        if isinstance(value, list):
            return [self._to_numpy(kind, hosts, one) for one in value]
        return value


def adapted(module: str = "dvkernels.kernels") -> Any:
    """Return a module of kernels, adapted to the kind of array that is chosen."""
    if KIND == "cpu":
        return importlib.import_module(module)
    return _Adapter(module, {"simulator": _Simulator, "cupy": _CuPy}[KIND])


kernels = adapted()


def host(array: Any) -> Any:
    """Return a NumPy array of the same values: a copy, if the array is in GPU memory."""
    return memory.gpu().to_host(array) if interop.is_on_gpu(array) else array


def devices(count: int) -> list[str]:
    """Return device names for ``count`` replicas: all on one GPU, or virtual CPU devices."""
    return [f"cpu:{k}" for k in range(count)] if KIND == "cpu" else ["cuda:0"] * count
