"""The waiting kernels as machine code: what they must contain, and what they must not.

Needs no GPU: NVVM, ptxas and nvdisasm of one release, from the extra ``cuda-compile``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda import compiler, tables, waiting
from dvkernels.reduce_op import ReduceOp

TOOLS = Path(sys.prefix) / f"lib/python3.{sys.version_info.minor}/site-packages/nvidia/cu13/bin"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or shutil.which("nvdisasm", path=TOOLS) is None,
    reason="needs numba-cuda, ptxas and nvdisasm: the extra cuda-compile",
)

# A block of 256 threads finds room on every GPU with this many registers a thread.
MOST_REGISTERS = 160
ALL_OF_SM_90 = [
    ("sum", "f4"), ("mean", "f2"), ("sum", ml_dtypes.bfloat16), ("max", "f8"), ("min", "f2"),
    ("prod", "c16"), ("prod", "c8"), ("sum", "i1"), ("max", "u1"), ("sum", "i8"), ("min", "u4"),
]  # fmt: skip
CASES = [("sum", "f4", capability) for capability in ((7, 5), (8, 0), (10, 0), (12, 0))]
CASES += [(op, dtype, (9, 0)) for op, dtype in ALL_OF_SM_90]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Numba asks the current device what to compile device functions for: answer without one."""
    import numba.cuda.dispatcher as dispatcher

    def answer(capability: tuple[int, int]) -> None:
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)

    return answer


def machine_code(kernel: Any, capability: tuple[int, int], folder: Path) -> tuple[str, str, str]:
    """Return PTX, what ptxas says, and SASS."""
    compiled = compiler.compile_to_ptx(kernel, capability)
    source, image = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(compiled.ptx)
    architecture = f"-arch=sm_{capability[0]}{capability[1]}"

    def run(tool: str, *args: object) -> str:
        done = subprocess.run(
            [TOOLS / tool, *map(str, args)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run("ptxas", architecture, "-v", source, "-o", image)
    return compiled.ptx, said, run("nvdisasm", "-c", image)


@pytest.mark.parametrize(("op", "dtype", "capability"), CASES)
def test_the_waiting_kernel(
    op: str, dtype: Any, capability: tuple[int, int], no_device: Any, tmp_path: Path
) -> None:
    no_device(capability)
    known = ReduceOp(op)
    codes = arithmetic.operation_code(known), arithmetic.type_code(np.dtype(dtype), known)
    ptx, said, sass = machine_code(waiting.waiting_kernel(*codes), capability, tmp_path)
    # 16 bytes an access, in the loop with four vectors in flight.
    assert len(re.findall(r"LDG\.E(?:\.\w+)*\.128", sass)) >= 8
    assert len(re.findall(r"STG\.E(?:\.\w+)*\.128", sass)) >= 5
    # Flags reach other GPUs and the host. What peers write is not read through the cache of
    # constants, which would not see it.
    assert "ld.acquire.sys.global.b64" in ptx
    assert "st.release.sys.global.b64" in ptx
    assert "ld.relaxed.sys.global.b64" in ptx
    assert ".nc." not in ptx
    assert re.search(r"LDG\.E\.64\.STRONG\.SYS", sass)
    assert re.search(r"STG\.E\.64\.STRONG\.SYS", sass)
    # Each wait looks at the clock and sleeps; all registers, no spills, no local memory.
    assert "%globaltimer" in ptx
    assert "nanosleep" in ptx
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= MOST_REGISTERS
    assert int(re.search(r"(\d+) bytes smem", said)[1]) <= 8 * tables.NUM_WORDS


@pytest.mark.parametrize(("op", "dtype"), [("sum", "f4"), ("sum", "f2")])
def test_the_kernel_of_one_row_waits_for_nobody(
    op: str, dtype: str, no_device: Any, tmp_path: Path
) -> None:
    no_device((9, 0))
    known = ReduceOp(op)
    codes = arithmetic.operation_code(known), arithmetic.type_code(np.dtype(dtype), known)
    ptx, said, sass = machine_code(waiting.row_kernel(*codes), (9, 0), tmp_path)
    assert not re.search(r"ld\.acquire|st\.release|nanosleep", ptx)
    assert "LDG.E.128" in sass
    assert "0 bytes spill stores" in said
