"""PTX in the package: made of the sources as they are, small, and accepted by the oldest driver."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import re
import subprocess
from pathlib import Path

import numba
import pytest
import record_ptx

from dvkernels.kernels.cuda.engine import catalogue, shipped_ptx
from dvkernels.kernels.cuda.engine.kernel import Kernel

STALE = (
    "the PTX that ships is not that of the sources: run python tests/compile/record_ptx.py in an "
    "environment with the extra cuda-compile, and commit dvkernels/kernels/cuda/ptx"
)
KERNELS = {str(kernel.name): kernel for kernel in catalogue.shipped()}
SOME = [*KERNELS][::17]  # of all operations, element types and families some
_NBYTES = 3_000_000
# CUDA 12.0's, the assembler inside the oldest driver that is supported.
OLDEST_ASSEMBLER = Path(numba.__file__).parents[1] / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"

needs_a_compiler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or os.environ.get("NUMBA_ENABLE_CUDASIM") == "1",
    reason="needs the extra cuda-compile, and no simulator",
)


def text_of(kernel: Kernel) -> str:
    return lzma.decompress(shipped_ptx.path_of(kernel).read_bytes()).decode()


def test_the_shipped_ptx_is_made_of_the_sources_as_they_are() -> None:
    record = json.loads(shipped_ptx.RECORD.read_text("utf-8"))
    assert record["sources"] == record_ptx.sources(), STALE
    assert record["digest"] == shipped_ptx.digest(record["sources"]), STALE
    assert shipped_ptx.unusable() == ""


def test_every_kernel_ships_and_nothing_else() -> None:
    paths = {shipped_ptx.path_of(kernel) for kernel in KERNELS.values()}
    assert {*shipped_ptx.FOLDER.iterdir()} == {*paths, shipped_ptx.RECORD}, STALE
    assert sum(path.stat().st_size for path in paths) < _NBYTES


@pytest.mark.parametrize("name", SOME)
def test_a_file_holds_one_kernel_for_old_drivers_and_gpus(name: str) -> None:
    text = text_of(KERNELS[name])
    major, minor = shipped_ptx.TARGET
    header = rf"\s*\.version {shipped_ptx.VERSION}\n\.target sm_{major}{minor}\n\.address_size 64\n"
    assert re.match(header, text)
    assert re.findall(r"\.entry (\w+)", text) == [f"dvkernels_{name.replace(' ', '_')}"]
    assert not re.search(r"\.extern|\bcall\b|\.local", text)  # nothing to link
    assert ("ld.acquire" in text) == name.startswith("waiting ")


@needs_a_compiler
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.wide) for n in KERNELS]
)
def test_the_sources_give_the_same_bytes(name: str) -> None:
    made_by, here = json.loads(shipped_ptx.RECORD.read_text())["compilers"], record_ptx.compilers()
    if made_by != here:
        pytest.skip(f"made by {made_by}, here are {here}")
    assert record_ptx.shipped_text(KERNELS[name]) == text_of(KERNELS[name]), STALE


@pytest.mark.skipif(not OLDEST_ASSEMBLER.exists(), reason="needs the extra cuda-compile")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.wide) for n in KERNELS]
)
def test_the_assembler_of_the_oldest_driver_accepts_it(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.ptx"
    source.write_text(text_of(KERNELS[name]))
    for architecture in (75, 90):
        command = [OLDEST_ASSEMBLER, f"-arch=sm_{architecture}", "-v", source, "-o", os.devnull]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert "0 bytes stack frame, 0 bytes spill stores" in ended.stderr
