"""Detection of CUDA-aware MPI: libraries that report it, that deny it, and that do neither."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest

from dvkernels.communicators.workers.gpu.cuda_aware import VARIABLE, detect
from dvkernels.errors import ClusterError

OPEN_MPI, MPICH = "Open MPI v5.0.11, package", "MPICH Version:      5.0.2"
CRAY, INTEL = (
    "MPI VERSION    : CRAY MPICH version 8.1.30",
    "Intel(R) MPI Library 2021.18.1 for Linux",
)
MVAPICH = "MVAPICH2 Version      :	2.3.7"
QUERY = "int MPIX_Query_cuda_support(void) {{ return {}; }}"
# The answer for another kind of GPU is the opposite; and the call may fail.
GPU_QUERY = """int MPIX_GPU_query_support(int kind, int *is_aware) {{
    *is_aware = kind == 0 ? {0} : 1 - {0};
    return {1};
}}"""
# As in some versions of MPICH, which mistake success for failure.
ASSERTS = "#include <stdlib.h>\nint MPIX_Query_cuda_support(void) { abort(); }"
compiler = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture
def built(tmp_path):
    """Return a function that compiles lines of C to a loaded library."""

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
    ("lines", "is_aware", "source"),
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
def test_the_query_functions_of_a_library_are_called(built, lines, is_aware, source):
    assert detect(MPICH, "mpi,system", built(*lines), {}) == (is_aware, source)


@pytest.mark.parametrize(
    ("kinds", "is_aware"),
    [
        ("mpi,system,cuda:device", True),
        ("mpi, cuda", True),
        ("mpi,system,cuda:host", False),
        ("mpi,rocm:device", False),
        ("", False),
    ],
)
def test_kinds_of_memory_by_mpi_4_1(kinds, is_aware):
    assert detect(OPEN_MPI, kinds, None, {}).is_aware == is_aware


class Says:
    """Library that reports to be CUDA-aware."""

    MPIX_Query_cuda_support = staticmethod(lambda: 1)


@pytest.mark.parametrize(
    ("version", "environ", "library", "is_aware"),
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
def test_libraries_that_need_a_setting_without_it(version, environ, library, is_aware):
    assert detect(version, "", library, environ).is_aware == is_aware


@pytest.mark.parametrize(
    ("said", "is_aware"), [("1", True), ("0", False), ("auto", True), ("", True), (" AUTO ", True)]
)
def test_the_environment_variable_overrides_the_library(said, is_aware):
    assert detect(OPEN_MPI, "cuda:device", None, {VARIABLE: said}).is_aware == is_aware
    assert detect(CRAY, "", None, {VARIABLE: said}).is_aware == (said == "1")


def test_a_malformed_variable_is_an_error():
    with pytest.raises(ClusterError, match=r"DVKERNELS_CUDA_AWARE_MPI='yes': expected 1 if MPI"):
        detect(OPEN_MPI, "", None, {VARIABLE: "yes"})


def test_the_mpi_of_this_process():
    pytest.importorskip("mpi4py")
    code = "from dvkernels.communicators.workers.gpu import cuda_aware; print(cuda_aware.of_mpi())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "takes memory of GPUs (" in ran.stdout or "does not take memory of GPUs (" in ran.stdout
