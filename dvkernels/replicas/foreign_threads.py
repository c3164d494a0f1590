"""Detection of collectives in a thread that a replica started, which has no replica context.

Contexts belong to threads. A thread that a replica starts has none, so its collectives would go to
the default strategy of one replica: all_reduce would return its input. A thread that is unrelated
to the replicas looks the same, and may mean exactly that. The difference is that the replica waits
for its thread.
"""

from __future__ import annotations

import os
import selectors
import threading
import types
from pathlib import Path

from dvkernels import thread_frames, tracebacks
from dvkernels.errors import ContextError
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.rendezvous import Rendezvous

__all__: list[str] = []

# Code objects at the bottom of a replica thread's stack; filled by the modules that run replicas.
ENTRANCES: set[types.CodeType] = set()

_LIBRARY = str(Path(threading.__file__).parent) + os.sep  # Python's standard library
_SITE = f"{os.sep}site-packages{os.sep}"
_WAITING = (threading.__file__, selectors.__file__)  # modules in which a thread waits for another


class UnscopedRendezvous(Rendezvous):
    """Rendezvous of code outside of every scope and run: a group of one."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(1)

    def meet(self, replica: int, request: CollectiveCall, is_observed: bool = False) -> object:
        """Perform the collective at once."""
        _check(request)
        return super().meet(replica, request, is_observed)

    def issue(self, replica: int, request: CollectiveCall) -> object:  # type: ignore[override]
        """Perform the collective at once."""
        _check(request)
        return super().issue(replica, request)


def _check(request: CollectiveCall) -> None:
    """Raise if a replica waits for a thread of its own, which may be this thread."""
    own = threading.get_ident()
    if own == threading.main_thread().ident:
        return
    for ident, frame in thread_frames.current_frames().items():
        if ident != own and _is_replica_that_waits(frame):
            raise ContextError(
                f"{request} was called in thread {threading.current_thread().name!r}, which has no "
                f"context, while a replica waits for a thread of its own: contexts belong to "
                f"threads, so this would be a reduction over one replica; hand the replica's on: "
                f"pool.submit(contextvars.copy_context().run, fn). If it means the default "
                f"strategy, say so: dv.get_strategy().run(fn)"
            )


def _is_replica_that_waits(frame: types.FrameType | None) -> bool:
    """Return whether a thread runs a replica whose user code waits for another thread."""
    if frame is None or frame.f_code.co_filename not in _WAITING:
        return False
    while frame is not None and _is_of_python(frame.f_code.co_filename):
        frame = thread_frames.back_of(frame)
    if frame is None or frame.f_code.co_filename.startswith(tracebacks.PACKAGE):
        return False  # this package waits, not user code
    while frame is not None and frame.f_code not in ENTRANCES:
        frame = thread_frames.back_of(frame)
    return frame is not None


def _is_of_python(filename: str) -> bool:
    return filename.startswith(_LIBRARY) and _SITE not in filename
