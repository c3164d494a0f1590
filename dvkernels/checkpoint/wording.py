"""What messages say of values that anybody may have made."""

from __future__ import annotations

import reprlib
from typing import Any

__all__: list[str] = []

_MOST_CHARACTERS = 80
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3  # what stands in itself, or at many places, has no end
_BRIEF.maxstring = _BRIEF.maxother = _MOST_CHARACTERS


def shown(value: Any) -> str:
    """Return a value as a message shows it; whatever it is, that does not fail or take long."""
    try:
        return _BRIEF.repr(value)[:_MOST_CHARACTERS]
    except Exception:  # a whole number of too many digits
        return f"what cannot be shown (a {type(value).__name__})"
