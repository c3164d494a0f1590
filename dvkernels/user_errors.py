"""Safe handling of the user's exceptions and values: notes, texts and causes that never raise.

A user's exception may be a frozen dataclass, raise in ``__str__``, override ``add_note`` or be its
own cause. Errors in handling it are ignored, so that the user gets the exception itself. Likewise
the ``repr`` of a user's value may fail.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast

__all__ = [
    "annotate",
    "brief",
    "context_manager",
    "describe",
    "is_caused_by",
    "latest_note",
    "text_of",
]


T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

_LINKS = ("__cause__", "__context__")


class _ShortRepr(reprlib.Repr):
    def repr_instance(self, value: object, level: int) -> str:
        """Return the object's own repr, and let its error through."""
        return repr(value)


_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel = 3  # a container that contains itself has no end
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 400


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception, unless it has it already or accepts none."""
    try:
        if note in _notes(error):
            return
        error.add_note(note)
    except Exception:
        try:  # a frozen dataclass refuses attributes; the base class's setter takes them
            BaseException.__setattr__(error, "__notes__", [*_notes(error), note])
        except Exception:
            return


def describe(error: BaseException | None) -> str:
    """Return the class name and the text of an exception; the name alone if ``str`` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def text_of(error: object) -> str:
    """Return the text of an exception; its class name if ``str`` fails."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def latest_note(error: BaseException) -> str | None:
    """Return the note that was added last; None if there is none."""
    try:
        return str(_notes(error)[-1])
    except Exception:
        return None


def brief(value: object, most: int = 80) -> str:
    """Return the first ``most`` characters of a value's ``repr``; its class if ``repr`` fails."""
    try:
        if type(value) is int and value.bit_length() > 1024:  # its digits would not help
            return f"an integer of {value.bit_length()} bits, beyond float64"
        return _SHORT_REPR.repr(value)[:most]
    except Exception:  # the user's repr fails, or an integer has too many digits
        return f"a {type(value).__name__}, whose repr fails"


def is_caused_by(error: BaseException, known: Iterable[BaseException]) -> bool:
    """Return whether an exception is a known one, or has one among its causes and contexts.

    Causes and contexts may form cycles (``raise e from e``), so each exception is visited once.
    """
    wanted = {id(error) for error in known}
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        if id(link) in wanted:
            return True
        seen.add(id(link))
        # The base class's attributes: a subclass may use these names for something else.
        cause, context = (getattr(BaseException, name).__get__(link) for name in _LINKS)
        links.append(cause or context)
    return False


def context_manager(function: Callable[P, Iterator[T]]) -> Callable[P, GeneratorContext[T]]:
    """Make a context manager of a generator function, like ``contextlib.contextmanager``.

    But ``contextmanager`` assigns ``__traceback__`` of an exception that passes through, which
    fails for a frozen dataclass. Here the exception is never modified and never suppressed.
    """

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> GeneratorContext[T]:
        return GeneratorContext(lambda: cast("Generator[T, Any, Any]", function(*args, **kwargs)))

    return make


class GeneratorContext(Generic[T]):
    """Context manager and decorator that :func:`block` makes of a generator function."""

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
            # PEP 479: a StopIteration leaves a generator as the cause of a RuntimeError.
            if raised is error or (isinstance(error, StopIteration) and raised.__cause__ is error):
                return
            raise

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with GeneratorContext(self._make):
                return function(*args, **kwargs)

        return inside


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))
