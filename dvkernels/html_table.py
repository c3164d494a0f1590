"""Tables of facts for notebooks: escaped HTML without styles or scripts, which any theme may show.

They say what ``repr`` says: nothing is copied from a GPU, no worker is waited for, and whatever
fails is shown as text.
"""

from __future__ import annotations

import enum
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dvkernels.user_errors import brief, describe, text_of

__all__ = ["of_attributes", "settings", "table"]

_MOST_ITEMS = 20
_MOST_CHARACTERS = 200


def of_attributes(**facts: str | Callable[[Any], object]) -> Callable[[Any], str]:
    """Return a method ``_repr_html_`` with a row for each fact that is not None.

    Parameters
    ----------
    **facts : str or callable
        The label of the row, and the attribute to show, such as ``"node.pipeline"``, or a function
        of the object.
    """
    getters = {
        label: operator.attrgetter(fact) if isinstance(fact, str) else fact
        for label, fact in facts.items()
    }

    def _repr_html_(self: Any) -> str:
        rows = [(label, _fact(get, self)) for label, get in getters.items()]
        return table(type(self).__name__, (), [row for row in rows if row[1] is not None])

    return _repr_html_


def settings(*names: str) -> tuple[Callable[[Any], str], Callable[[Any], str]]:
    """Return methods ``__repr__`` and ``_repr_html_`` that show these attributes."""

    def __repr__(self: Any) -> str:
        shown = (f"{name}={brief(_fact(operator.attrgetter(name), self))}" for name in names)
        return f"{type(self).__name__}({', '.join(shown)})"

    return __repr__, of_attributes(**{name: name for name in names})


def _fact(get: Callable[[Any], object], owner: object) -> object:
    try:
        return get(owner)
    except Exception as error:
        return describe(error)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; the first cell of each row is its head.

    Examples
    --------
    >>> table("Device", (), [("kind", "cpu")])
    '<table><caption>Device</caption><tr><th scope="row">kind</th><td>cpu</td></tr></table>'
    """
    from html import escape  # slow to import, and needed in notebooks only

    def cell(value: object) -> str:
        return "<br>".join(map(escape, _lines(value)))

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{cell(first)}</th>'
        + "".join(f"<td>{cell(value)}</td>" for value in others)
        + "</tr>"
        for first, *others in rows
    )
    head = f"<tr>{head}</tr>" if head else ""
    return f"<table><caption>{escape(caption)}</caption>{head}{body}</table>"


def _lines(value: object) -> list[str]:
    """Return the text of a value, of a collection a line for each of its first items."""
    if not isinstance(value, (tuple, list, Mapping)) or not value:
        return [_text(value)]
    pairs = isinstance(value, Mapping)
    first = itertools.islice(value, _MOST_ITEMS)
    found = [f"{each}: {_text(value[each])}" if pairs else _text(each) for each in first]
    return [*found, f"and {len(value) - _MOST_ITEMS} more"][: len(value)]


def _text(value: object) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    text = text_of(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
