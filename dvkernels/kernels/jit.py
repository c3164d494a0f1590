"""Compilation of this package's functions by Numba: the only decorators that the package uses.

They do what ``numba.njit`` and ``numba.cfunc`` do, with four differences: compiled code is cached
by compile_cache.py, which tolerates a damaged or read-only cache; an interrupt never reaches the
compiler, which it would leave locked; ``NUMBA_DISABLE_JIT``, for users who debug their own
functions, leaves these compiled; and every function with a signature can be compiled ahead of its
first call.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

from numba.core import caching, ccallback, config, registry, serialize, sigutils, typeinfer
from numba.core import compiler as numba_compiler
from numba.core import runtime as numba_runtime
from numba.core.compiler_lock import global_compiler_lock

from dvkernels.kernels import compile_cache
from dvkernels.threads import shielded

__all__ = ["ahead", "cfunc", "njit"]

_config: Any = config  # its names are missing from the stubs
_compiler_lock: Any = global_compiler_lock
_compiler: Any = numba_compiler
_runtime: Any = numba_runtime
_serialized: Any = serialize.dumps
_normalized: Any = sigutils.normalize_signature
_IMPORTER = "<frozen importlib._bootstrap>"  # the file name in the frames of an import
_CPUDispatcher: Any = registry.CPUDispatcher
_CFunc: Any = ccallback.CFunc
_NullCache: Any = caching.NullCache

_lazy: list[tuple[Any, str]] = []  # dispatchers compiled at their first call, and their signatures


class _Cache(_NullCache):  # type: ignore[misc]
    """Numba's cache of one function, in the files of compile_cache.py."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        qualname = function.__qualname__.replace("<", "").replace(">", "")
        self._name = f"{function.__module__.rpartition('.')[2]}.{qualname}"

    def _file(self, signature: Any, codegen: Any) -> str:
        code = self._function.__code__
        enclosed = tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        key = compile_cache.digest(
            repr(signature).encode(),
            repr(codegen.magic_tuple()).encode(),
            code.co_code,
            b"%d" % code.co_firstlineno,
            _serialized(enclosed) if enclosed else b"",
            compile_cache.stamp(code.co_filename),
        )
        return f"{self._name}-{key}.code"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        # Not ``refresh``, which imports what only the compiler needs: 0.3 s.
        _runtime.rtsys.initialize(target_context)
        body = compile_cache.read(self._file(signature, target_context.codegen()))
        if body is None:
            return None
        try:
            return _compiler.CompileResult._rebuild(target_context, *pickle.loads(body))
        except Exception:  # of an incompatible version after all: compile
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        if not result.library.has_dynamic_globals:
            compile_cache.write(
                self._file(signature, result.codegen), _serialized(result._reduce())
            )


def _compile_shielded(compile_now: Callable[..., Any], *arguments: Any) -> Any:
    """Compile on a thread that no interrupt reaches, also under ``NUMBA_DISABLE_JIT``."""
    # That thread must not wait for a lock that this one holds: the compiler's, where one function
    # calls another, or that of a module being imported, which the compiler may look up.
    if _compiler_lock.is_locked() or _is_importing():
        return _compile(compile_now, *arguments)
    return shielded.beyond_interrupts(_compile, compile_now, *arguments)


def _is_importing() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename != _IMPORTER:
        frame = frame.f_back
    return frame.f_code.co_filename == _IMPORTER


def _compile(compile_now: Callable[..., Any], *arguments: Any) -> Any:
    with _compiler_lock:
        is_disabled, _config.DISABLE_JIT = _config.DISABLE_JIT, 0
        try:
            return compile_now(*arguments)
        finally:
            _config.DISABLE_JIT = is_disabled


class _Dispatcher(_CPUDispatcher):  # type: ignore[misc]
    def compile(self, signature: Any) -> Any:
        return _compile_shielded(super().compile, signature)


def njit(
    signature: str | None = None, *, called_with: str | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function for other compiled functions and for Python.

    Parameters
    ----------
    signature : str, optional
        Types to compile for at once; without it, each call compiles for the types it needs.
    called_with : str, optional
        Types with which Python calls the function, for which :func:`ahead` compiles it.
    **options
        Options of ``numba.njit``; ``cache=False`` for functions of users.
    """
    is_cached = options.pop("cache", True)

    def decorate(function: Callable[..., Any]) -> Any:
        targets = {"nopython": True, "boundscheck": None, **options}
        dispatcher = _Dispatcher(function, targetoptions=targets)
        if is_cached:
            dispatcher._cache = _Cache(function)
        if called_with is not None:
            _lazy.append((dispatcher, called_with))
        if signature is not None:
            with typeinfer.register_dispatcher(dispatcher):
                dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate


def cfunc(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a C function, with an ``address``, at once.

    Parameters
    ----------
    signature
        Types to compile for.
    **options
        Options of ``numba.cfunc``; ``cache=False`` where users' functions are called.
    """
    is_cached = options.pop("cache", True)

    def decorate(function: Callable[..., Any]) -> Any:
        found = _CFunc(function, _normalized(signature), {}, options)
        if is_cached:
            found._cache = _Cache(function)
        _compile_shielded(found.compile)
        return found

    return decorate


def ahead() -> int:
    """Compile every function that is otherwise compiled at its first call; return their number."""
    for dispatcher, signature in _lazy:
        dispatcher.compile(_normalized(signature)[0])
    return len(_lazy)
