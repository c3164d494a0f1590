"""Limits on the threads of BLAS, OpenMP and Numba, so that replicas do not compete for the cores.

OpenBLAS, unless built with OpenMP, has one number of threads in a process: it is lowered before the
first step of a strategy and restored when the last one closes. OpenMP, Numba and MKL have one in
each thread: it is lowered in each thread of the team, and on the caller's thread, replica 0's,
during the step. threadpoolctl finds the libraries; their numbers are read and written here, since
its own functions set OpenBLAS from one thread only (3.8), and take 14 us.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import operator
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, final

from dvkernels import deadlines
from dvkernels.devices import cpu
from dvkernels.kernels import threading_layer
from dvkernels.replicas.step_lock import StepLock
from dvkernels.threads import shielded

__all__: list[str] = []

# Of each name a library reads the first that is set; OMP_NUM_THREADS is read by all of them.
_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS")


# Functions that get and set the number of threads, by threadpoolctl's name of the library's API.
_OF_THREAD = {
    "openmp": ("omp_get_max_threads", "omp_set_num_threads"),
    "mkl": ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads_Local"),
    "blis": ("bli_thread_get_num_threads", "bli_thread_set_num_threads"),
    "flexiblas": ("flexiblas_get_num_threads", "flexiblas_set_num_threads"),
}
_OPENBLAS = tuple(
    (f"{prefix}openblas_get_num_threads{suffix}", f"{prefix}openblas_set_num_threads{suffix}")
    for prefix in ("", "scipy_")
    for suffix in ("", "64_", "_64")
)


class _Setting(NamedTuple):
    """Number of threads of a library, read and written without giving up the GIL."""

    get: Callable[[], int]
    set: Callable[[int], None]


def _setting(get: Any, set_number: Any) -> _Setting:
    """Return the setting of two functions of C."""
    set_number.restype = None
    return _Setting(get, set_number)


class _Held(NamedTuple):
    """A number of threads that has been lowered, from ``original`` to ``limit``."""

    original: int
    limit: int


# Code of the functions that run a replica, with a local ``share`` (None: no limit), by whether the
# thread is the caller's. Filled by their modules.
entrances: dict[types.CodeType, bool] = {}
# By a caller's thread: restores Numba, which was started during the step.
late: dict[int, Callable[[], object]] = {}

# By the library's path, in the order in which they were found.
_of_thread: dict[str, _Setting] = {}
_of_process: dict[str, _Setting] = {}
settings: tuple[_Setting, ...] = ()  # of a thread
_followed: set[int] | None = set()  # threads that saw Numba start; None: found by a search since
_num_searched = -1  # the modules that had been imported when libraries were last searched for
_held: dict[str, _Held] = {}  # of the process
_open: list[weakref.ref[ThreadLimit]] = []  # limits in force
_is_stale = False  # whether the process has yet to follow a change of _open or _of_process
_settling = 0  # the process of which a thread does so; other threads wait for the lock
_lock = StepLock()
_has_warned = False


@final
class ThreadLimit:
    """Limit of one strategy: at most ``share`` threads of each library in each of its replicas."""

    __slots__ = ("__weakref__", "_num_replicas", "_own", "num_modules", "share")

    def __init__(self, num_replicas: int) -> None:
        self.share = share_of(num_replicas)
        self._num_replicas = num_replicas
        self._own: weakref.ref[ThreadLimit] | None = None  # in _open
        # The imported modules when it was last applied: an import may have loaded a library.
        self.num_modules = -1

    def apply(self, stacklevel: int) -> None:
        """Lower the settings of the process to the share, and find those of threads.

        ``stacklevel`` is that of the user's call, for a warning.
        """
        self.num_modules = shielded.uninterrupted(self._apply, is_atomic=True)
        if _threadpoolctl() is None:
            _warn(self._num_replicas, self.share, stacklevel + 1)

    def _apply(self) -> int:
        num_modules = _find_libraries()
        if self._own is None:
            self._own = weakref.ref(self, _drop)
            _open.append(self._own)
        _settle()
        return num_modules

    def release(self) -> None:
        """Raise the settings of the process to the least of the other shares, or restore them."""
        if self._own is not None:
            shielded.uninterrupted(self._release, is_atomic=True)

    def _release(self) -> None:
        own, self._own = self._own, None
        self.num_modules = -1
        if own is not None:
            _drop(own)


def share_of(num_replicas: int) -> int:
    """Return the threads of each replica: this process's cores, shared out, and at least one."""
    return max(1, cpu.usable_cores() // num_replicas)


def lower(share: int, num_lowered: int) -> int:
    """Lower all but the first settings of a thread that is the strategy's; return their number.

    Each is lowered once: what user code sets on the thread later stays.
    """
    found = settings
    for setting in found[num_lowered:]:
        if setting.get() > share:
            setting.set(share)
    return len(found)


def run_limited(share: int, function: Callable[..., object], *arguments: object) -> object:
    """Call a function on the caller's thread, with lowered settings that are restored."""
    undo: list[Callable[[], None]] = []
    undoing = map(operator.call, undo)
    try:
        for setting in settings:
            number = setting.get()
            if number > share:
                undo.append(functools.partial(setting.set, number))
                setting.set(share)
        return function(*arguments)
    finally:
        # One call in C, and none before it: no interrupt leaves the thread limited. Each returns
        # None, so that any() makes them all.
        any(undoing)


def restore_late() -> None:
    """Restore Numba after the step in which this thread started it."""
    own = threading.get_ident()
    if own in late:
        late[own]()
        del late[own]


def threads_by_library() -> dict[str, int] | None:
    """Return the number of threads of each loaded library now; None without threadpoolctl."""
    threadpoolctl = _threadpoolctl()
    if threadpoolctl is None:
        return None
    return {
        f"{library.internal_api} ({os.path.basename(library.filepath)})": library.num_threads
        for library in threadpoolctl.ThreadpoolController().lib_controllers
    }


def _threadpoolctl() -> Any:
    """Return the package threadpoolctl, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("threadpoolctl")
    return None


def _find_libraries() -> int:
    """Find the libraries that are loaded; return the number of modules imported before."""
    global settings, _num_searched, _followed
    controllers = []
    num_modules = len(sys.modules)
    if num_modules == _num_searched:
        return num_modules
    threadpoolctl = _threadpoolctl()
    if threadpoolctl is not None:
        num_modules = len(sys.modules)
        controllers = threadpoolctl.ThreadpoolController().lib_controllers
    for library in controllers:
        path, api = library.filepath, library.internal_api
        if path in _of_thread or path in _of_process:
            continue
        symbols = ctypes.PyDLL(path)
        if api in _OF_THREAD:
            _of_thread[path] = _setting(*(getattr(symbols, name) for name in _OF_THREAD[api]))
        elif api == "openblas" and library.threading_layer != "openmp":  # else it asks OpenMP
            names = next(names for names in _OPENBLAS if hasattr(symbols, names[0]))
            _of_process[path] = _setting(*(getattr(symbols, name) for name in names))
    if _find_numba() is not None:
        _followed = None
    settings = tuple(_of_thread.values())
    _num_searched = num_modules
    return num_modules


def _find_numba() -> _Setting | None:
    functions = threading_layer.functions_of_thread()
    if functions is not None:
        _of_thread.setdefault("numba", _setting(*functions))
    return _of_thread.get("numba")


def _follow_numba() -> None:
    """Lower Numba's threads in a replica that starts them, or asks for them in the same step.

    From the next step, or the next item of a map, on they are among the settings. What this has to
    know of a thread is read from its frames, so that no step pays for it.
    """
    global settings
    own = threading.get_ident()
    frame = sys._getframe() if _open and _followed is not None and own not in _followed else None
    while frame is not None and frame.f_code not in entrances:
        frame = frame.f_back
    share: int | None = None if frame is None else frame.f_locals["share"]
    numba = None if share is None else _find_numba()
    if frame is None or share is None or numba is None:
        return
    if _followed is not None:
        _followed.add(own)
    settings = tuple(_of_thread.values())
    if numba.get() > share:
        if entrances[frame.f_code]:
            late.setdefault(own, functools.partial(numba.set, numba.get()))
        numba.set(share)


threading_layer.after_launch.append(_follow_numba)


def _drop(ref: weakref.ref[ThreadLimit]) -> None:
    """Settle after a strategy was closed, or dropped without that."""
    with contextlib.suppress(ValueError):  # the child of a fork had not noticed yet
        _open.remove(ref)
    _settle()


def _settle() -> None:
    """Hold the settings of the process to the smallest open share, or restore what they were.

    Nothing is done twice, and nothing undone that somebody else has set meanwhile. A garbage
    collection may drop a strategy, and call this, at any moment of this: the outer call goes on.
    """
    global _is_stale, _settling
    _is_stale = True
    lock = _lock.lock()
    try:
        if not lock.acquire(timeout=deadlines.DEFAULT_TIMEOUT_SECONDS) or _settling == os.getpid():
            return
        try:
            _settling = os.getpid()
            while _is_stale:
                _is_stale = False
                shares = [limit.share for ref in _open if (limit := ref()) is not None]
                for path in list(_of_process):
                    _hold(path, min(shares, default=None))
        finally:
            _settling = 0
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            lock.release()
        except RuntimeError:  # not acquired
            pass


def _hold(path: str, limit: int | None) -> None:
    """Hold one library to ``limit``; None: restore it."""
    setting, held = _of_process[path], _held.get(path)
    now = setting.get()
    original = now if held is None or now != held.limit else held.original
    wanted = original if limit is None else min(original, limit)
    if wanted != original:
        _held[path] = _Held(original, wanted)  # first: after an interrupt it can be restored
    if wanted != now:
        setting.set(wanted)
    if wanted == original:
        _held.pop(path, None)


def _warn(num_replicas: int, share: int, stacklevel: int) -> None:
    """Warn once where nothing can hold BLAS and OpenMP to fewer threads than they have."""
    global _has_warned
    numbers = [os.environ.get(name, "").partition(",")[0] for name in _VARIABLES]
    chosen = [int(number) for number in numbers if number.isdecimal()]
    most = max(chosen, default=cpu.usable_cores())
    if _has_warned or most <= share:
        return
    _has_warned = True
    warnings.warn(
        f"{num_replicas} replicas share {cpu.usable_cores()} cores, and BLAS and OpenMP may use "
        f"{most} threads in each of them. So that they are held to {share}, install threadpoolctl "
        f"(python -m pip install 'dvkernels[threads]'), or set OMP_NUM_THREADS={share} before "
        f"Python starts; threads='all' leaves them as they are, without this warning",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
