"""PTX and machine code of the waiting kernels: system-scope flags, and waits with a deadline."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import toolchain
from catalogue import kernels

from dvkernels.kernels.cuda.engine import compiler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1",
    reason="needs the extra cuda-compile, and no simulator",
)
KERNELS = kernels()


def test_flags_have_the_scope_of_the_system_and_waits_end(tmp_path: Path) -> None:
    ptx = compiler.compile_to_ptx(KERNELS["waiting add float32"], (7, 5)).ptx
    assert "ld.acquire.sys.global.b64" in ptx
    assert "st.release.sys.global.b64" in ptx
    assert "ld.relaxed.sys.global.b64" in ptx  # the stop word
    assert "%globaltimer" in ptx
    assert "nanosleep" in ptx
    # Memory that peers write is not read through the non-coherent cache.
    assert ".nc." not in ptx
    for architecture in toolchain.architectures()[-2:]:
        code = toolchain.assemble(ptx, architecture, tmp_path).code
        assert code is not None
        assert re.search(r"LDG?\.E\.64\.STRONG\.SYS", code)
        assert re.search(r"STG?\.E\.64\.STRONG\.SYS", code)
        # Four vectors of each of two sources are in flight together.
        assert toolchain.loads_in_flight(code) >= 8


def test_a_row_alone_waits_for_nobody() -> None:
    ptx = compiler.compile_to_ptx(KERNELS["row add float32"], (7, 5)).ptx
    assert not re.search(r"ld\.acquire|st\.release|nanosleep", ptx)
