"""Claim on a piece of work that several threads may begin, and one of them does."""

from __future__ import annotations

__all__: list[str] = []


class Claim:
    """Claim that the first caller of :meth:`take` gets, until it gives it back.

    It takes no lock, so neither an interrupt nor a fork can leave one held.
    """

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = [None]

    @property
    def is_free(self) -> bool:
        """Whether nobody has taken it."""
        return bool(self._tokens)

    def take(self) -> bool:
        """Return True to the first caller, False to all others."""
        try:
            self._tokens.pop()  # atomic
        except IndexError:
            return False
        return True

    def give_back(self) -> None:
        """Let another caller take it."""
        self._tokens.append(None)
