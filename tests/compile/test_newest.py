"""A kernel of each family, compiled for the newest GPUs: NVVM takes another path for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import toolchain
from catalogue import kernels
from test_numba_cuda import pytestmark  # noqa: F401

from dvkernels.kernels.cuda.engine import compiler

FAMILIES = ["add float32", "add bfloat16", "waiting add float32", "row add float32",
            "adam float32", "farther float32"]  # fmt: skip
KERNELS = kernels()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kernel_of_each_family(name: str, tmp_path: Path) -> None:
    architecture = toolchain.architectures()[-1]
    compiled = compiler.compile_to_ptx(KERNELS[name], divmod(architecture, 10))
    assert f".target sm_{architecture}" in compiled.ptx
    assembled = toolchain.assemble(compiled.ptx, architecture, tmp_path)
    assert (assembled.spills, assembled.stack) == (0, 0)
    assert assembled.code is not None
    assert re.search(r"LDG\.E(\.\w+)*\.128", assembled.code)
    assert re.search(r"STG\.E(\.\w+)*\.128", assembled.code)
    assert not re.search(r"\b(LDL|STL)\b", assembled.code)
