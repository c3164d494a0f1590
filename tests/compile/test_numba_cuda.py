"""Import of the installed numba-cuda: no warning, no missing name, missing libraries named."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1",
    reason="needs the extra cuda-compile, and no simulator",
)
ROOT = Path(__file__).resolve().parents[2]


def run(program: str) -> str:
    """Return the output of a program for which every warning is an error."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


COMPILE = """
import numpy as np
before = dir(np)
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import catalogue, compiler
kernel = catalogue.collective(arithmetic.ADD, arithmetic.type_code(np.dtype("f4")))
compiled = compiler.compile_to_ptx(kernel, (9, 0))
assert compiler.assemble(compiled, (9, 0)).startswith(b"\\x7fELF")
"""


def test_a_kernel_compiles_without_a_warning_and_numpy_stays_as_it_was() -> None:
    """NumPy 2.5 lacks names that numba-cuda takes from it, and warns of what it does."""
    run(COMPILE + "assert dir(np) == before")


def test_the_target_is_found_where_its_pth_file_is_not_read() -> None:
    """``pip install --target`` and PYTHONPATH leave Numba's own, old target in place."""
    program = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "numba_cuda" not in repr(type(finder))
                    and "numba_cuda" not in repr(finder)]
sys.modules.pop("_numba_cuda_redirector", None)
from dvkernels.kernels.cuda.engine.cuda_target import cuda
assert "numba_cuda" in cuda.__file__, cuda.__file__
"""
    run(program)


HIDING = """
import sys
from cuda import pathfinder
find = pathfinder.load_nvidia_dynamic_lib

def hiding(name):
    if name == sys.argv[1]:
        raise pathfinder.DynamicLibNotFoundError(f'Failure finding "lib{name}.so"')
    return find(name)

pathfinder.load_nvidia_dynamic_lib = hiding
"""


@pytest.mark.parametrize("library", ["nvvm", "nvrtc", "nvJitLink"])
def test_a_library_that_is_not_found_is_named_with_the_remedy(library: str) -> None:
    ending = f"""
from dvkernels.errors import DeviceError
try:
    exec({COMPILE!r})
except DeviceError as error:
    print(error)
"""
    said = run(f"import sys; sys.argv[1:] = [{library!r}]\n" + HIDING + ending)
    assert f"lib{library}.so" in said
    assert "pip install 'dvkernels[cuda13]'" in said
    assert "CUDA_HOME" in said
