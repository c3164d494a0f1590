"""CUDA target of Numba: numba-cuda, imported beside a NumPy that it does not know.

numba-cuda is in maintenance and does not follow NumPy 2.5, which has no ``row_stack`` any more and
warns of time spans without a unit (NVIDIA/numba-cuda#907). So this module imports it, with what it
misses, and the others take ``cuda`` from here. A part of the CUDA toolkit that is not found becomes
an error of ours.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dvkernels.devices import cuda as devices
from dvkernels.errors import DeviceError
from dvkernels.kernels import numba_import
from dvkernels.kernels.cuda.engine import simulator
from dvkernels.threads import shielded

__all__ = ["compile_ptx", "cuda", "diagnosed", "load"]

_RENAMED = {"row_stack": "vstack"}  # names that NumPy 2.5 has removed, and what they meant
# Loaded by numba-cuda at its first compilation only; it names what NumPy 2.5 has removed. Older
# releases of numba-cuda take it from Numba, which knows NumPy 2.5.
_IMPLEMENTATIONS = "numba.cuda.np.arrayobj"
_lock = threading.RLock()


def load(name: str) -> Any:
    """Import a module of numba-cuda, which finds the names that NumPy 2.5 has removed meanwhile.

    Raises
    ------
    DeviceError
        It does not load beside this NumPy; the error names a remedy.
    """
    return shielded.beyond_interrupts(_load, name)


def _load(name: str) -> Any:
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'generic' unit", DeprecationWarning)
        missing = [removed for removed in _RENAMED if not hasattr(np, removed)]
        for removed in missing:
            setattr(np, removed, getattr(np, _RENAMED[removed]))
        try:
            return numba_import.module(name)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise DeviceError(
                f"numba-cuda does not load beside NumPy {np.__version__} "
                f"({type(error).__name__}: {error}): python -m pip install 'numpy<2.5', "
                "or update numba-cuda"
            ) from error
        finally:
            for removed in missing:
                delattr(np, removed)


def _load_target() -> Any:
    # Installed by ``pip install --target`` or found by PYTHONPATH, numba-cuda has not put itself in
    # the place of Numba's own, deprecated target, as it does where its .pth file is read.
    with contextlib.suppress(ImportError):
        importlib.import_module("_numba_cuda_redirector")
    target = load("numba.cuda")
    if simulator.IS_ON:
        simulator.share_swaps(target)
    return target


@functools.cache
def _load_implementations() -> None:
    with contextlib.suppress(ModuleNotFoundError):
        load(_IMPLEMENTATIONS)


@contextlib.contextmanager
def diagnosed() -> Iterator[None]:
    """Raise :class:`DeviceError`, with the remedy, where a part of the CUDA toolkit is missing."""
    try:
        yield
    except Exception as error:
        # Classes of cuda.pathfinder and of numba-cuda, which may be missing themselves.
        name = type(error).__name__
        if name.startswith("DynamicLibNot") or name in ("NvvmSupportError", "NvrtcSupportError"):
            raise DeviceError(
                "a part of the CUDA toolkit that compiles kernels is missing "
                f"({(str(error).strip() or name).splitlines()[0]}): {devices.install_command()}, "
                "or let the environment variable CUDA_HOME name the folder of a CUDA toolkit"
            ) from error
        raise


@diagnosed()
def compile_ptx(function: Callable[..., Any], signature: Any, **options: Any) -> str:
    """Return the PTX of a function: ``numba.cuda.compile_ptx``, ready for this NumPy."""
    _load_implementations()
    ptx, _ = cuda.compile_ptx(function, signature, **options)
    return str(ptx)


cuda: Any = _load_target()  # its functions carry no types
