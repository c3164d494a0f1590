"""Lazy import of the backends: nothing is compiled before it is used."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dvkernels.devices.array_spec import Array
from dvkernels.kernels import numba_import

__all__: list[str] = []


@functools.cache
def cpu() -> Any:
    """Return the CPU twin: the collectives over NumPy arrays."""
    return numba_import.module("dvkernels.kernels.cpu")


@functools.cache
def cuda() -> Any:
    """Return the CUDA twin: the collectives over arrays in GPU memory."""
    return numba_import.module("dvkernels.kernels.cuda")


def of(array: Array) -> Any:
    """Return the twin for an array: the CPU twin for NumPy arrays, else the CUDA twin."""
    return of_type(type(array))


@functools.cache
def of_type(array_type: type[Array]) -> Any:
    """Return the twin for the arrays of a class: the CPU twin for NumPy's, else the CUDA twin."""
    return cpu() if issubclass(array_type, np.ndarray) else cuda()


@functools.cache
def gate() -> Any:
    """Return the module of compiled gates between threads of this process."""
    return numba_import.module("dvkernels.kernels.cpu.engine.gate")


@functools.cache
def thread_pool() -> Any:
    """Return the module of the threads that share the jobs of kernels."""
    return numba_import.module("dvkernels.kernels.cpu.engine.thread_pool")


@functools.cache
def permutation() -> Any:
    """Return the module of the compiled Feistel permutation, which shuffles indices."""
    return numba_import.module("dvkernels.kernels.cpu.feistel")


@functools.cache
def take() -> Any:
    """Return the module of the compiled gather of rows."""
    return numba_import.module("dvkernels.kernels.cpu.take")


@functools.cache
def row_updates() -> Any:
    """Return the module of compiled updates of rows."""
    return numba_import.module("dvkernels.kernels.cpu.row_updates")
