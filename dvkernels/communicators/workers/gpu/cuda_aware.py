"""Detection of CUDA-aware MPI: by an environment variable of this package, or by asking MPI.

Each MPI answers in its own way, and some report how they were built, not what they do at run time:

    Cray MPICH, MVAPICH, Intel MPI   an environment variable of theirs turns it on; default: off
    MPI 4.1                          the info key ``mpi_memory_alloc_kinds`` of a communicator; a
                                     library may name fewer kinds than it supports
    MPICH, Intel MPI                 ``MPIX_GPU_query_support``, called before the next: in some
                                     versions of MPICH ``MPIX_Query_cuda_support`` calls it, and
                                     then asserts that it has failed
    Open MPI, MVAPICH                ``MPIX_Query_cuda_support``
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from dvkernels.errors import ClusterError

__all__ = ["VARIABLE", "CudaAwareness", "detect", "of_mpi"]

VARIABLE = "DVKERNELS_CUDA_AWARE_MPI"
_MEANINGS = {"": None, "auto": None, "0": False, "1": True}
_KINDS_KEY = "mpi_memory_alloc_kinds"
_KINDS = {"cuda", "cuda:device"}  # a kind without a restrictor includes every restrictor
_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA


class _Switch(NamedTuple):
    """Environment variables by which an MPI library becomes CUDA-aware."""

    library: str  # part of MPI_Get_library_version
    settings: tuple[str, ...]  # any of them turns it on
    is_enough: bool  # MPI_Init fails where the setting cannot be obeyed


_SWITCHES = (
    _Switch("CRAY MPICH", ("MPICH_GPU_SUPPORT_ENABLED=1",), True),
    _Switch("MVAPICH", ("MVP_USE_CUDA=1", "MV2_USE_CUDA=1"), False),
    _Switch("Intel(R) MPI", ("I_MPI_OFFLOAD=1", "I_MPI_OFFLOAD=2"), False),
)


class CudaAwareness(NamedTuple):
    """Whether MPI is CUDA-aware, and the source of the answer."""

    is_aware: bool
    source: str

    def __str__(self) -> str:
        return f"{'takes' if self.is_aware else 'does not take'} memory of GPUs ({self.source})"


def of_mpi() -> CudaAwareness:
    """Return the CUDA-awareness of this process's MPI; imports mpi4py.

    Raises
    ------
    ImportError
        There is no mpi4py, or no MPI.
    ClusterError
        ``DVKERNELS_CUDA_AWARE_MPI`` is malformed.
    """
    from mpi4py import MPI

    info = MPI.COMM_WORLD.Get_info()
    try:
        kinds = info.get(_KINDS_KEY) or ""
    finally:
        info.Free()
    try:
        # Through mpi4py's extension, also the symbols of the MPI library behind it are found.
        library: Any = ctypes.CDLL(MPI.__file__)
    except OSError:
        library = None
    return detect(MPI.Get_library_version(), kinds, library, os.environ)


def detect(version: str, kinds: str, library: Any, environ: Mapping[str, str]) -> CudaAwareness:
    """Return the CUDA-awareness of an MPI library.

    Parameters
    ----------
    version : str
        Its MPI_Get_library_version.
    kinds : str
        Its ``mpi_memory_alloc_kinds`` (MPI 4.1), separated by commas; "" if it has none.
    library : ctypes.CDLL or None
        The initialized library; None if its functions cannot be found.
    environ : mapping of str

    Raises
    ------
    ClusterError
        ``DVKERNELS_CUDA_AWARE_MPI`` is malformed.

    Examples
    --------
    >>> print(detect("Open MPI v6.0.0", "system,mpi,cuda:device", None, {}))
    takes memory of GPUs (mpi_memory_alloc_kinds has cuda:device)
    >>> print(detect("CRAY MPICH version 9.0.1", "", None, {}))
    does not take memory of GPUs (MPICH_GPU_SUPPORT_ENABLED=1 is not set)
    """
    value = environ.get(VARIABLE, "").strip().lower()
    if value not in _MEANINGS:
        raise ClusterError(
            f"{VARIABLE}={environ[VARIABLE]!r}: expected 1 if MPI takes memory of GPUs, 0 if "
            f"arrays of GPUs are to go through memory of the host, auto or nothing to ask MPI"
        )
    meaning = _MEANINGS[value]
    if meaning is not None:
        return CudaAwareness(meaning, f"{VARIABLE}={value}")
    switch = next((one for one in _SWITCHES if one.library in version), None)
    if switch is not None and not any(_is_set(one, environ) for one in switch.settings):
        return CudaAwareness(False, f"{' or '.join(switch.settings)} is not set")
    named = sorted(_KINDS & {kind.strip() for kind in kinds.split(",")})
    if named:
        return CudaAwareness(True, f"{_KINDS_KEY} has {named[-1]}")
    if hasattr(library, "MPIX_GPU_query_support"):
        answer = ctypes.c_int(0)
        code = library.MPIX_GPU_query_support(ctypes.c_int(_CUDA), ctypes.byref(answer))
        return CudaAwareness(code == 0 and answer.value == 1, "MPIX_GPU_query_support")
    if hasattr(library, "MPIX_Query_cuda_support"):
        return CudaAwareness(library.MPIX_Query_cuda_support() == 1, "MPIX_Query_cuda_support")
    if switch is not None and switch.is_enough:
        return CudaAwareness(True, switch.settings[0])
    return CudaAwareness(False, "it does not say that it does")


def _is_set(setting: str, environ: Mapping[str, str]) -> bool:
    name, _, value = setting.partition("=")
    return environ.get(name, "").strip() == value
