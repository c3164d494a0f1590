"""Yardstick in C: the same all-reduce by the C compiler, where the machine has one.

``c_kernel.c`` is compiled at first use, in a temporary folder that is removed at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvkernels.devices import cpu
from dvkernels.errors import DeviceError

__all__ = ["CProbe", "describe", "is_supported", "reason_for_none"]

_SOURCE = Path(__file__).with_name("c_kernel.c")
_FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread"]
_STEP = 64  # numbers; a multiple of what an iteration takes
_SECONDS_TO_COMPILE = 60.0


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "there is no C compiler (cc, or CC)"
    with tempfile.TemporaryDirectory(prefix="dvkernels-probe-") as folder:
        path = os.path.join(folder, "c_kernel.so")
        for machine in (["-march=native"], []):
            command = [compiler, *_FLAGS, *machine, str(_SOURCE), "-o", path]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_SECONDS_TO_COMPILE
                )
                if done.returncode == 0:
                    library = ctypes.CDLL(path)
                    library.state_nbytes.restype = ctypes.c_size_t
                    return library
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{compiler} could not be run: {error}"
    return f"{compiler} cannot compile the probe: {done.stderr.strip()[:200]}"


def reason_for_none() -> str:
    """Return why there is no C probe on this machine, empty where there is one."""
    found = _library()
    return found if isinstance(found, str) else ""


def describe() -> str:
    """Return a line about the probe, or why there is none."""
    found = _library()
    if isinstance(found, str):
        return f"none: {found}"
    return f"vectors of {found.vector_nbytes()} bytes, {cpu.usable_cores()} threads"


def is_supported(buffers: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Return whether the probe takes these buffers: contiguous, whole steps of 256 bytes."""
    return all(
        buffer.flags.c_contiguous and buffer.nbytes % (4 * _STEP) == 0 and buffer.nbytes
        for buffer in buffers
    )


class CProbe:
    """All-reduce in C of given buffers, and a pass in C that touches them one after another.

    Parameters
    ----------
    buffers : sequence of contiguous array
        As many bytes each, a multiple of 256. The all-reduce takes them for float32 numbers, and
        leaves their mean in all of them; the touching pass leaves every bit as it is.

    Raises
    ------
    DeviceError
        If there is no C compiler, or the buffers do not fit.
    """

    def __init__(self, buffers: Sequence[np.ndarray[Any, Any]]) -> None:
        library = _library()
        if isinstance(library, str):
            raise DeviceError(f"bench: no C probe: {library}")
        if not is_supported(buffers):
            raise DeviceError("bench: the C probe takes contiguous buffers of whole 256 bytes")
        self._library = library
        self._buffers = [*buffers]  # kept alive
        self._pointers = (ctypes.c_void_p * len(buffers))(*[b.ctypes.data for b in buffers])
        self._length = ctypes.c_size_t(buffers[0].nbytes // 4)

    def seconds(self, passes: int, only_touches: bool) -> float:
        """Return the seconds per pass; its threads are started before, and warm."""
        state = ctypes.create_string_buffer(self._library.state_nbytes() + 64)
        address = ctypes.c_void_p((ctypes.addressof(state) + 63) & -64)
        if self._library.begin(address, cpu.usable_cores()):
            raise DeviceError("bench: the threads of the C probe could not be started")

        def run(times: int) -> None:
            self._library.run(
                address, self._pointers, len(self._buffers), self._length, int(only_touches), times
            )

        try:
            run(1)
            started = time.perf_counter_ns()
            run(passes)
            return (time.perf_counter_ns() - started) / 1e9 / passes
        finally:
            self._library.end(address)
