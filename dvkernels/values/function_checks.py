"""Checks of user functions: coroutine and generator functions are refused."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

from dvkernels.user_errors import brief

__all__: list[str] = []

_KINDS = {
    inspect.CO_COROUTINE: "a coroutine function (async def)",
    inspect.CO_ITERABLE_COROUTINE: "a coroutine function (types.coroutine)",
    inspect.CO_ASYNC_GENERATOR: "an asynchronous generator function",
    inspect.CO_GENERATOR: "a generator function (it has a yield)",
}
REFUSED = functools.reduce(int.__or__, _KINDS)  # flags of the code of functions to refuse


def check(verb: str, fn: Any) -> None:
    """Raise ``TypeError`` if ``fn`` is not callable, or a coroutine or generator function.

    A call of the latter returns at once, and nothing of its body has run.
    """
    if type(fn) is types.FunctionType:  # the common case, in 0.1 us
        flags = fn.__code__.co_flags
    else:
        if not callable(fn):
            raise TypeError(f"{verb} expected a function, got {brief(fn)}, a {type(fn).__name__}")
        flags = getattr(_code_of(fn), "co_flags", 0)
    if not flags & REFUSED:
        return
    kind = next(words for flag, words in _KINDS.items() if flags & flag)
    remedy = (
        "write a function that returns its result (a list, say)"
        if flags & inspect.CO_GENERATOR and not flags & inspect.CO_ITERABLE_COROUTINE
        else "write a plain function, which may use asyncio.run inside"
    )
    raise TypeError(
        f"{verb} expected a function that does its work when it is called, got {kind}: "
        f"{getattr(fn, '__qualname__', fn)!s:.80}; calling that runs nothing of it, so {remedy}"
    )


def check_arguments(verb: str, args: object, kwargs: object) -> None:
    """Raise ``ValueError`` unless these are the arguments of a call: a sequence and a dict."""
    if not isinstance(args, (list, tuple)):
        raise ValueError(f"{verb}: args must be a list or tuple, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"{verb}: kwargs must be a dict, got {type(kwargs).__name__}")


def _code_of(fn: Any) -> Any:
    """Return the code object that a call of ``fn`` runs; None if it is not Python code."""
    for _ in range(100):  # __call__ may form a cycle
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, type):
            return None  # a call creates an object
        elif hasattr(fn, "__code__"):  # a function or a method
            return fn.__code__
        else:
            fn = getattr(type(fn), "__call__", None)  # noqa: B004 - the method itself is needed
            if not isinstance(fn, (types.FunctionType, functools.partial)):
                return None
    return None
