"""Machine code of every kernel: accesses, registers, spills, for every architecture, without a GPU.

Needs the extra ``cuda-compile``. ``python tests/compile/record_budget.py`` records the budget anew.
"""

from __future__ import annotations

import importlib.util
import json
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
from dvkernels.kernels.cuda.engine import catalogue, compiler, operations
from dvkernels.kernels.cuda.engine.kernel import Compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1",
    reason="needs the extra cuda-compile, and no simulator",
)
BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())
SPARE = 8  # registers that another release of the assembler may take more
KERNELS = kernels()


def test_the_budget_knows_every_kernel() -> None:
    assert BUDGET.keys() == KERNELS.keys(), "run: python tests/compile/record_budget.py"
    # Kernels within a GPU, waiting kernels, rows, optimizers, custom reductions.
    assert len(KERNELS) == 42 + 42 + 8 + 8 + 8
    assert len(catalogue.DTYPES) == 15


@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, tmp_path: Path) -> None:
    compiled = compiler.compile_to_ptx(KERNELS[name], (7, 5))
    check_ptx(compiled.ptx, name.startswith("waiting "))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda architecture: toolchain.assemble(compiled.ptx, architecture, tmp_path),
            toolchain.architectures(),
        )
        for architecture, assembled in zip(toolchain.architectures(), found, strict=True):
            check(name, architecture, assembled)


def check_ptx(ptx: str, is_between_gpus: bool) -> None:
    body = ptx[ptx.index(".entry") :]
    assert "ld.global.v4.b32" in body
    assert "st.global.v4.b32" in body
    assert not re.search(r"\bcall\b", body), "a function that the toolkit would have to link"
    assert ".local" not in ptx
    if is_between_gpus:
        assert "acquire.sys" in body
        assert "release.sys" in body


def check(name: str, architecture: int, assembled: toolchain.Assembled) -> None:
    budget = BUDGET[name]
    assert assembled.spills == 0, architecture
    assert assembled.stack == 0, architecture
    assert assembled.registers <= budget["registers"] + SPARE, architecture
    assert assembled.shared <= budget["shared"], architecture
    if assembled.code is not None:
        assert not re.search(r"\b(LDL|STL)\b", assembled.code), architecture
        assert re.search(r"LDG\.E(\.\w+)*\.128", assembled.code), architecture
        assert re.search(r"STG\.E(\.\w+)*\.128", assembled.code), architecture


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
