"""A kernel of each family, compiled for the newest GPUs: NVVM takes another path for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import toolchain
from test_machine_code import KERNELS, check
from test_numba_cuda import pytestmark  # noqa: F401

from dvkernels.kernels.cuda.engine import compiler

FAMILIES = ["add float32", "add bfloat16", "waiting add float32", "row add float32",
            "adam float32", "farther float32"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kernel_of_each_family(name: str, tmp_path: Path) -> None:
    architecture = toolchain.newest()
    compiled = compiler.compile_to_ptx(KERNELS[name], divmod(architecture, 10))
    assert f".target sm_{architecture}" in compiled.ptx
    check(name, architecture, toolchain.assemble(compiled.ptx, architecture, tmp_path))
