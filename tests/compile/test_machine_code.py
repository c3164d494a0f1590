"""Machine code of every kernel: accesses, registers, spills, for every architecture, without a GPU.

Needs the extra ``cuda-compile``.
"""

from __future__ import annotations

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import toolchain
from catalogue import kernels

from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import DeviceError, UnsupportedDTypeError
from dvkernels.kernels.cuda.engine import (
    catalogue,
    compiler,
    operations,
    shipped_ptx,
    table_layout,
)
from dvkernels.kernels.cuda.engine.kernel import Compiled, Kernel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1",
    reason="needs the extra cuda-compile, and no simulator",
)
KERNELS = kernels()
# Loads in flight of a thread: four vectors of two sources; two of a gradient and of each state.
_LOADS = {"adagrad": 6, "adam": 8, "momentum": 6, "nesterov": 6, "sgd": 4}
# With unpacked lanes, or a function of the user's, the first additions may come early; and with
# momentum and Adagrad in float64, for which ptxas 13.5 schedules the first vector early on sm_120.
_FEWER_LOADS = 4
_UNPACKED = {"int8", "uint8", "int16", "uint16"}
# Of four vectors 16 (a first source, two at a time, the last); of one, three at a time, 5; of two
# vectors and the states of Adam 22.
_MOST_WIDE_LOADS = 24


def test_the_catalogue_is_complete() -> None:
    # Kernels within a GPU, waiting kernels, rows, optimizers, custom reductions.
    assert len(KERNELS) == 42 + 42 + 8 + 10 + 8
    assert len(catalogue.DTYPES) == 15


@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, tmp_path: Path) -> None:
    ptx = ptx_of(KERNELS[name])
    check_ptx(ptx, name.startswith("waiting "))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda architecture: toolchain.assemble(ptx, architecture, tmp_path),
            toolchain.architectures(),
        )
        for architecture, assembled in zip(toolchain.architectures(), found, strict=True):
            check(name, architecture, assembled)


def ptx_of(kernel: Kernel) -> str:
    """Return the PTX that ships, which is that of the sources, or PTX compiled here."""
    image = shipped_ptx.find(kernel, (7, 5))
    return compiler.compile_to_ptx(kernel, (7, 5)).ptx if image is None else image.decode()


def check_ptx(ptx: str, is_between_gpus: bool) -> None:
    body = ptx[ptx.index(".entry") :]
    assert "ld.global.v4.b32" in body
    # One barrier behind the copy of the table, and one in the loop that waits for other GPUs.
    assert len(re.findall(r"\bbar(?:rier)?\.sync", body)) == 1 + is_between_gpus
    assert "st.global.v4.b32" in body
    assert not re.search(r"\bcall\b", body), "a function that the toolkit would have to link"
    assert ".local" not in ptx
    if is_between_gpus:
        assert "acquire.sys" in body
        assert "release.sys" in body


def check(name: str, architecture: int, assembled: toolchain.Assembled) -> None:
    """Check that machine code keeps what the launch bounds of its kernel promise.

    As many blocks as they say run at once, without a spill, each thread with several loads in
    flight. Within that, the number of registers makes no difference.
    """
    kernel = KERNELS[name]
    threads, blocks = kernel.launch_bounds
    assert assembled.spills == 0, architecture
    assert assembled.stack == 0, architecture
    assert threads * blocks * (-(-assembled.registers // 8) * 8) <= 65536, architecture
    assert assembled.shared <= 8 * table_layout.NUM_WORDS, architecture
    if assembled.code is not None:
        assert not re.search(r"\b(LDL|STL)\b", assembled.code), architecture
        assert toolchain.loads_in_flight(assembled.code) >= promised_loads(name), architecture
        # The loops are not unrolled.
        assert toolchain.num_wide_loads(assembled.code) <= _MOST_WIDE_LOADS, architecture
        assert re.search(r"STG\.E(\.\w+)*\.128", assembled.code), architecture


def promised_loads(name: str) -> int:
    """Return the loads of a thread that are to be in flight together."""
    *operation, dtype = name.split()
    is_unpacked = dtype in _UNPACKED and "add" not in operation
    is_early = dtype == "float64" and operation[0] in ("adagrad", "momentum", "nesterov")
    if KERNELS[name].name is None or is_unpacked or is_early:
        return _FEWER_LOADS
    return _LOADS.get(operation[0], 8)


@pytest.mark.parametrize("name", ["mul complex64", "mul complex128"])
def test_complex_products_round_as_numpy_does(name: str) -> None:
    """Fused, a product and a sum would round once, and the bits differ from NumPy's."""
    ptx = compiler.compile_to_ptx(KERNELS[name], (7, 5)).ptx
    assert "mul.rn.f" in ptx  # the assembler may fuse products that do not say how they round
    assert "fma.rn" not in ptx


def test_the_linker_makes_machine_code() -> None:
    compiled = compiler.compile_to_ptx(KERNELS["add float32"], (9, 0))
    assert compiler.assemble(compiled, (9, 0)).startswith(b"\x7fELF")


def test_a_linker_that_fails_says_what_to_look_at() -> None:
    with pytest.raises(DeviceError, match="of one release"):
        compiler.assemble(Compiled("broken", ".version 9.0\nnonsense"), (9, 0))


def test_a_function_of_the_users_that_does_not_compile_is_named() -> None:
    op = CustomReduction(numba.njit(lambda a, b: a ^ b), 0, "xor")
    with pytest.raises(UnsupportedDTypeError, match=r"(?s)'xor'.*for float32 on a GPU.*float32"):
        operations.resolve(op, np.dtype("f4"))


def test_a_function_of_the_users_may_call_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.cuda import dispatcher

    # What it calls is compiled for the device at hand; here there is none.
    device = SimpleNamespace(compute_capability=(7, 5))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    square = numba.njit(lambda x: x * x)
    op = CustomReduction(numba.njit(lambda a, b: square(a) + b), 0, "sum of squares")
    kernel = catalogue.collective(*operations.resolve(op, np.dtype("f4")))
    check_ptx(compiler.compile_to_ptx(kernel, (7, 5)).ptx, False)
