"""Whether MPI takes the memory of GPUs: what the user says of it, or else what it says of itself.

No MPI says so in the same way, and some say it of how they were built, not of what they do:

    Cray MPICH, MVAPICH, Intel MPI   a variable of theirs turns it on; without it the answer is no
    MPI 4.1                          the info key ``mpi_memory_alloc_kinds`` of a communicator; a
                                     library may name fewer kinds than it takes
    MPICH, Intel MPI                 ``MPIX_GPU_query_support``. Asked before the next: in some
                                     versions of MPICH that one calls this, and then asserts that
                                     it has failed
    Open MPI, MVAPICH                ``MPIX_Query_cuda_support``
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from dvkernels.errors import ClusterError

__all__ = ["VARIABLE", "CudaAwareness", "of_mpi", "told"]

VARIABLE = "DVKERNELS_CUDA_AWARE_MPI"
_MEANINGS = {"": None, "auto": None, "0": False, "1": True}
_KINDS_KEY = "mpi_memory_alloc_kinds"
_KINDS = {"cuda", "cuda:device"}  # a kind without a restrictor is all of it
_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA


class _Switch(NamedTuple):
    """How a library is told to take memory of GPUs."""

    library: str  # what its version says of itself
    settings: tuple[str, ...]  # any of them turns it on
    is_enough: bool  # it does not start where it cannot do what is asked for


_SWITCHES = (
    _Switch("CRAY MPICH", ("MPICH_GPU_SUPPORT_ENABLED=1",), True),
    _Switch("MVAPICH", ("MVP_USE_CUDA=1", "MV2_USE_CUDA=1"), False),
    _Switch("Intel(R) MPI", ("I_MPI_OFFLOAD=1", "I_MPI_OFFLOAD=2"), False),
)


class CudaAwareness(NamedTuple):
    """Whether MPI takes memory of GPUs, and who says so."""

    is_there: bool
    source: str

    def __str__(self) -> str:
        return f"{'takes' if self.is_there else 'does not take'} memory of GPUs ({self.source})"


def of_mpi() -> CudaAwareness:
    """Return what holds for the MPI of this process, which mpi4py has loaded or loads now.

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
        library: Any = ctypes.CDLL(MPI.__file__)  # finds what the MPI behind it has, too
    except OSError:
        library = None
    return told(MPI.Get_library_version(), kinds, library, os.environ)


def told(version: str, kinds: str, library: Any, environ: Mapping[str, str]) -> CudaAwareness:
    """Return what an MPI says.

    Parameters
    ----------
    version : str
        What it says that it is.
    kinds : str
        Its kinds of memory by MPI 4.1, separated by commas; "" if it does not tell.
    library : ctypes.CDLL or None
        It itself, initialized; None: its functions cannot be found.
    environ : mapping of str

    Raises
    ------
    ClusterError
        ``DVKERNELS_CUDA_AWARE_MPI`` is malformed.

    Examples
    --------
    >>> print(told("Open MPI v6.0.0", "system,mpi,cuda:device", None, {}))
    takes memory of GPUs (mpi_memory_alloc_kinds has cuda:device)
    >>> print(told("CRAY MPICH version 9.0.1", "", None, {}))
    does not take memory of GPUs (MPICH_GPU_SUPPORT_ENABLED=1 is not set)
    """
    said = environ.get(VARIABLE, "").strip().lower()
    if said not in _MEANINGS:
        raise ClusterError(
            f"{VARIABLE}={environ[VARIABLE]!r}: expected 1 if MPI takes memory of GPUs, 0 if "
            f"arrays of GPUs are to go through memory of the host, auto or nothing to ask MPI"
        )
    meaning = _MEANINGS[said]
    if meaning is not None:
        return CudaAwareness(meaning, f"{VARIABLE}={said}")
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
