"""Exceptions of user code: annotated, printed and followed without ever failing in their stead.

An exception may be a frozen dataclass, raise in ``__str__``, have an ``add_note`` of its own or be
its own cause. Whatever goes wrong with it here is dropped: the user gets the exception as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["annotate", "in_words", "rests_on"]


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception, if it takes one."""
    try:
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
        links.append(link.__cause__ or link.__context__)
    return False


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))
