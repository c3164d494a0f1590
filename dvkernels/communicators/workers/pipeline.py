"""Pieces of an array on their way, several at once: one travels while another is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

__all__: list[str] = []

Piece = Iterator[None]  # goes a stage further each time it is asked

_OVER = object()


def carry(pieces: Iterable[Piece], meet: Callable[[Piece | None], None]) -> None:
    """Carry pieces through their stages, a new one at each turn.

    The newest goes first: what it sends travels while the others are seen to.

    Parameters
    ----------
    pieces : iterable of Piece
        Made when their turn comes.
    meet : callable
        Called before each turn, with the piece that is new in it; None: no more are coming.
    """
    coming = iter(pieces)
    under_way: list[Piece] = []
    while True:
        piece = next(coming, None)
        if piece is not None:
            under_way.insert(0, piece)
        if not under_way:
            return
        meet(piece)
        under_way = [one for one in under_way if next(one, _OVER) is not _OVER]
