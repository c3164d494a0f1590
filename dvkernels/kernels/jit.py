"""How functions of this package are compiled: the one way to Numba for all of them.

As ``numba.njit`` and ``numba.cfunc``, with four differences: what was compiled is kept where
compile_cache.py says, damaged or not to be written as that may be; an interrupt never hits the
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
from numba.core.compiler_lock import global_compiler_lock

from dvkernels.kernels import compile_cache
from dvkernels.threads import shielded

__all__ = ["ahead", "cfunc", "njit"]

_config: Any = config  # whose names the stubs do not know
_compiler_lock: Any = global_compiler_lock
_compiler: Any = numba_compiler
_serialized: Any = serialize.dumps
_normalized: Any = sigutils.normalize_signature
_IMPORTER = "<frozen importlib._bootstrap>"  # where the frames of an import lie
_CPUDispatcher: Any = registry.CPUDispatcher
_CFunc: Any = ccallback.CFunc
_NullCache: Any = caching.NullCache

_waiting: list[tuple[Any, str]] = []  # what is compiled at its first call, and for which types


class _Cache(_NullCache):  # type: ignore[misc]
    """What Numba asks for compiled code, and gives it to."""

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
        target_context.refresh()
        body = compile_cache.read(self._file(signature, target_context.codegen()))
        if body is None:
            return None
        try:
            return _compiler.CompileResult._rebuild(target_context, *pickle.loads(body))
        except Exception:  # of another make after all: compile
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        if not result.library.has_dynamic_globals:
            compile_cache.write(
                self._file(signature, result.codegen), _serialized(result._reduce())
            )


def _undisturbed(compile_now: Callable[..., Any], *arguments: Any) -> Any:
    """Compile where no interrupt reaches it, whether or not the user's own functions are."""
    # Another thread must not wait for what this one holds: the compiler, where one function calls
    # another, or a module that is being imported, which the compiler may look up.
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
        return _undisturbed(super().compile, signature)


def njit(
    signature: str | None = None, *, called_with: str | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function for other compiled functions and for Python.

    Parameters
    ----------
    signature : str, optional
        For which types, here and now; otherwise for those of its calls, when they come.
    called_with : str, optional
        The types that Python calls it with, for which :func:`ahead` compiles it.
    **options
        Those of ``numba.njit``; ``cache=False`` for functions of users.
    """
    is_kept = options.pop("cache", True)

    def decorate(function: Callable[..., Any]) -> Any:
        targets = {"nopython": True, "boundscheck": None, **options}
        dispatcher = _Dispatcher(function, targetoptions=targets)
        if is_kept:
            dispatcher._cache = _Cache(function)
        if called_with is not None:
            _waiting.append((dispatcher, called_with))
        if signature is not None:
            with typeinfer.register_dispatcher(dispatcher):
                dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate


def cfunc(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a C function, with an ``address``, here and now.

    Parameters
    ----------
    signature
        For which types.
    **options
        Those of ``numba.cfunc``; ``cache=False`` for what depends on functions of users.
    """
    is_kept = options.pop("cache", True)

    def decorate(function: Callable[..., Any]) -> Any:
        found = _CFunc(function, _normalized(signature), {}, options)
        if is_kept:
            found._cache = _Cache(function)
        _undisturbed(found.compile)
        return found

    return decorate


def ahead() -> int:
    """Compile every function that waits for its first call; return how many there are."""
    for dispatcher, signature in _waiting:
        dispatcher.compile(_normalized(signature)[0])
    return len(_waiting)
