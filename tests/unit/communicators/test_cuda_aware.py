"""Whether MPI takes memory of GPUs: libraries that say so, that deny it, and that do neither."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest

from dvkernels.communicators.workers.gpu.cuda_aware import VARIABLE, told
from dvkernels.errors import ClusterError

OPEN_MPI, MPICH = "Open MPI v5.0.11, package", "MPICH Version:      5.0.2"
CRAY, INTEL = (
    "MPI VERSION    : CRAY MPICH version 8.1.30",
    "Intel(R) MPI Library 2021.18.1 for Linux",
)
MVAPICH = "MVAPICH2 Version      :	2.3.7"
QUERY = "int MPIX_Query_cuda_support(void) {{ return {}; }}"
# Of another kind of GPU it says the opposite; and it may fail.
GPU_QUERY = """int MPIX_GPU_query_support(int kind, int *is_there) {{
    *is_there = kind == 0 ? {0} : 1 - {0};
    return {1};
}}"""
# As in some versions of MPICH: it takes success for failure.
ASSERTS = "#include <stdlib.h>\nint MPIX_Query_cuda_support(void) { abort(); }"
compiler = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture
def built(tmp_path):
    """Return a function that returns a library of these lines of C."""

    def build(*lines):
        if compiler is None:
            pytest.skip("needs a compiler of C")
        source, library = tmp_path / "mpi.c", tmp_path / f"libmpi{len(lines)}.so"
        source.write_text("\n".join(lines) or "int nothing;")
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True, timeout=60)
        return ctypes.CDLL(str(library))

    return build


@pytest.mark.parametrize(
    ("lines", "is_there", "source"),
    [
        ([QUERY.format(1)], True, "MPIX_Query_cuda_support"),
        ([QUERY.format(0)], False, "MPIX_Query_cuda_support"),
        ([GPU_QUERY.format(1, 0)], True, "MPIX_GPU_query_support"),
        ([GPU_QUERY.format(0, 0)], False, "MPIX_GPU_query_support"),
        ([GPU_QUERY.format(1, 5)], False, "MPIX_GPU_query_support"),
        ([GPU_QUERY.format(0, 0), ASSERTS], False, "MPIX_GPU_query_support"),
        ([], False, "it does not say that it does"),
    ],
)
def test_its_functions_are_asked(built, lines, is_there, source):
    assert told(MPICH, "mpi,system", built(*lines), {}) == (is_there, source)


@pytest.mark.parametrize(
    ("kinds", "is_there"),
    [
        ("mpi,system,cuda:device", True),
        ("mpi, cuda", True),
        ("mpi,system,cuda:host", False),
        ("mpi,rocm:device", False),
        ("", False),
    ],
)
def test_kinds_of_memory_by_mpi_4_1(kinds, is_there):
    assert told(OPEN_MPI, kinds, None, {}).is_there == is_there


class Says:
    """A library that says of itself that it can."""

    MPIX_Query_cuda_support = staticmethod(lambda: 1)


@pytest.mark.parametrize(
    ("version", "environ", "library", "is_there"),
    [
        (CRAY, {}, Says, False),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "0"}, Says, False),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "1"}, Says, True),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "1"}, None, True),
        (MVAPICH, {}, Says, False),
        (MVAPICH, {"MV2_USE_CUDA": "1"}, Says, True),
        (MVAPICH, {"MVP_USE_CUDA": "1"}, Says, True),
        (MVAPICH, {"MV2_USE_CUDA": "1"}, None, False),
        (INTEL, {}, Says, False),
        (INTEL, {"I_MPI_OFFLOAD": "1"}, Says, True),
        (INTEL, {"I_MPI_OFFLOAD": "1"}, None, False),
        (OPEN_MPI, {"MPICH_GPU_SUPPORT_ENABLED": "1"}, None, False),
        (OPEN_MPI, {}, Says, True),
    ],
)
def test_what_a_library_must_be_told_first(version, environ, library, is_there):
    assert told(version, "", library, environ).is_there == is_there


@pytest.mark.parametrize(
    ("said", "is_there"), [("1", True), ("0", False), ("auto", True), ("", True), (" AUTO ", True)]
)
def test_the_user_knows_better(said, is_there):
    assert told(OPEN_MPI, "cuda:device", None, {VARIABLE: said}).is_there == is_there
    assert told(CRAY, "", None, {VARIABLE: said}).is_there == (said == "1")


def test_a_malformed_word_is_an_error():
    with pytest.raises(ClusterError, match=r"DVKERNELS_CUDA_AWARE_MPI='yes': expected 1 if MPI"):
        told(OPEN_MPI, "", None, {VARIABLE: "yes"})


def test_the_mpi_of_this_process_can_be_asked():
    pytest.importorskip("mpi4py")
    code = "from dvkernels.communicators.workers.gpu import cuda_aware; print(cuda_aware.of_mpi())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "takes memory of GPUs (" in ran.stdout or "does not take memory of GPUs (" in ran.stdout
