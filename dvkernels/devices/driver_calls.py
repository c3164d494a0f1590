"""Calls of the CUDA driver's library: their errors, and the contexts of devices that they run in.

Most calls act on the current context of their thread: memory, modules and default streams are its
own. A thread of the caller may have any current, or none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

from dvkernels.errors import DeviceError

__all__ = ["OUT_OF_MEMORY", "RELAXED", "DriverCalls"]

RELAXED = 2  # capture mode of a thread whose calls no capture of another stream forbids
_NO_DEVICE, OUT_OF_MEMORY = 100, 2
_CAPTURE_ERRORS = range(900, 909)
_CAPTURE_HINT = (
    ": a CUDA graph is being captured, and the call cannot become part of it; make the same call "
    "once before the capture, then in it with streams that it captures (not the default stream), "
    "in place or with out="
)


class DriverCalls:
    """Calls of the driver's library, a ``ctypes.CDLL`` or a test double."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.contexts: dict[int, ctypes.c_void_p] = {}
        self._pid = os.getpid()
        code = library.cuInit(0)
        self.problem = "" if code in (0, _NO_DEVICE) else self.error_name(code)

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked after the driver was initialized."""
        return os.getpid() != self._pid

    @contextlib.contextmanager
    def within(self, device: int) -> Iterator[None]:
        """Make the context of a device current inside ``with``, then restore the previous one."""
        previous_context, context = self.current(), self.context(device)
        if previous_context.value == context.value:
            yield
            return
        try:  # calls of C in the last clause: no interrupt comes before them
            self.check("cuCtxSetCurrent", context)
            yield
        finally:
            self.library.cuCtxSetCurrent(previous_context)

    @contextlib.contextmanager
    def beside_captures(self, device: int) -> Iterator[None]:
        """Enter a device's context for calls that allocate, load or free.

        While a graph is captured, in this thread or, in the mode "global", in any other, the driver
        would refuse such calls and end the capture; in the mode "relaxed" of this thread it serves
        them, outside of the graph.
        """
        mode = ctypes.c_int(RELAXED)
        with self.within(device):
            self.exchange_capture_mode(mode)
            try:
                yield
            finally:
                self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def exchange_capture_mode(self, mode: ctypes.c_int) -> None:
        """Exchange the capture mode of this thread with ``mode``."""
        self.check("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def enter(self, device: int) -> None:
        """Make the primary context of a device, which all libraries share, current."""
        self.check("cuCtxSetCurrent", self.context(device))

    def context(self, device: int) -> ctypes.c_void_p:
        """Return the primary context of a device."""
        context = self.contexts.get(device)
        if context is None:
            # It is never released, so several threads may count their references to it.
            context = ctypes.c_void_p()
            handle = self.handle(device)
            self.check("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self.contexts[device] = context
        return context

    def current(self) -> ctypes.c_void_p:
        """Return the current context of this thread, which may be null."""
        found = ctypes.c_void_p()
        self.check("cuCtxGetCurrent", ctypes.byref(found))
        return found

    def handle(self, device: int) -> int:
        """Return the driver's handle of a device."""
        return self.get("cuDeviceGet", device)

    def get(self, function: str, *args: Any, kind: Any = ctypes.c_int) -> int:
        """Return what a function writes to its first argument, 0 for a null pointer."""
        found = kind()
        self.raise_for(function, getattr(self.library, function)(ctypes.byref(found), *args))
        return found.value or 0

    def check(self, function: str, *args: Any) -> None:
        """Call a function; raise on failure."""
        self.raise_for(function, getattr(self.library, function)(*args))

    def raise_for(self, function: str, code: int) -> None:
        """Raise :class:`DeviceError` unless the code that a function returned is 0."""
        if code == OUT_OF_MEMORY:
            raise DeviceError(
                f"{function}: the GPU is out of memory; free arrays (in CuPy "
                "get_default_memory_pool().free_all_blocks()), or use smaller ones"
            )
        if code:
            hint = _CAPTURE_HINT if code in _CAPTURE_ERRORS else ""
            raise DeviceError(f"{function} failed with {self.error_name(code)}{hint}")

    def error_name(self, code: int) -> str:
        """Return the name of an error code."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"").decode() or f"error {code} of the CUDA driver"
