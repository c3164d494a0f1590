"""Exceptions of user code: annotated, printed and followed without ever failing in their stead.

An exception may be a frozen dataclass, raise in ``__str__``, have an ``add_note`` of its own or be
its own cause. Whatever goes wrong with it here is dropped: the user gets the exception as it is.
Likewise the user's values in messages of ours: their ``repr`` may fail as well.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast

__all__ = ["annotate", "block", "in_words", "latest_note", "rests_on", "shown", "text_of"]


T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

_LINKS = ("__cause__", "__context__")


class _Brief(reprlib.Repr):
    def repr_instance(self, value: object, level: int) -> str:
        """Return a repr that fails where the object's own does."""
        return repr(value)


_BRIEF = _Brief()
_BRIEF.maxlevel = 3  # what stands in itself, or at many places, has no end
_BRIEF.maxstring = _BRIEF.maxother = 400


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception, if it takes one and does not have it."""
    try:
        if note in _notes(error):
            return
        error.add_note(note)
    except Exception:
        try:  # a frozen dataclass refuses attributes; the base class's setter takes them
            BaseException.__setattr__(error, "__notes__", [*_notes(error), note])
        except Exception:
            return


def in_words(error: BaseException | None) -> str:
    """Return the type and the text of an exception; the type alone if it cannot be printed."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def text_of(error: object) -> str:
    """Return the text of an exception; its type if it cannot be printed."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def latest_note(error: BaseException) -> str | None:
    """Return the note that was added last, None if there is none."""
    try:
        return str(_notes(error)[-1])
    except Exception:
        return None


def shown(value: object, most: int = 80) -> str:
    """Return the beginning of a value's ``repr``, of any size; its type if that fails."""
    try:
        if type(value) is int and value.bit_length() > 1024:  # its digits say nothing
            return f"an integer of {value.bit_length()} bits, beyond float64"
        return _BRIEF.repr(value)[:most]
    except Exception:  # of user code, or of an integer of thousands of digits
        return f"a {type(value).__name__}, whose repr fails"


def rests_on(error: BaseException, known: Iterable[BaseException]) -> bool:
    """Tell whether an exception is a known one, or was raised because of it or while handling it.

    Causes and contexts may form circles (``raise e from e``): each exception is looked at once.
    """
    wanted = {id(one) for one in known}
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        if id(link) in wanted:
            return True
        seen.add(id(link))
        # The base class's own, whatever a subclass calls by these names.
        cause, context = (getattr(BaseException, name).__get__(link) for name in _LINKS)
        links.append(cause or context)
    return False


def block(function: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
    """Make a context manager of a generator function, nearly as ``contextlib.contextmanager`` does.

    That one assigns the traceback of the exception that passes through, which a frozen dataclass
    refuses. Here an exception is left alone, and always goes on.
    """

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(lambda: cast("Generator[T, Any, Any]", function(*args, **kwargs)))

    return make


class Block(Generic[T]):
    """What :func:`block` makes; also a decorator."""

    def __init__(self, make: Callable[[], Generator[T, Any, Any]]) -> None:
        self._make = make

    def __enter__(self) -> T:
        self._steps = self._make()
        return next(self._steps)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                next(self._steps)
            else:
                self._steps.throw(error)
        except StopIteration:
            return
        except BaseException as raised:
            # A StopIteration that passes through a generator comes out as a cause.
            if raised is error or (isinstance(error, StopIteration) and raised.__cause__ is error):
                return
            raise

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with Block(self._make):
                return function(*args, **kwargs)

        return inside


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))
