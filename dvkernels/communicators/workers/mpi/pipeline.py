"""Pipelining: pieces of an array in flight at once, so that transfer and reduction overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

__all__: list[str] = []

Piece = Iterator[None]  # each next() carries out one stage

_DONE = object()


def run_pipeline(pieces: Iterable[Piece], before_turn: Callable[[Piece | None], None]) -> None:
    """Run pieces through their stages, starting a new piece at each turn.

    The newest piece goes first: its messages travel during the stages of the older pieces.

    Parameters
    ----------
    pieces : iterable of Piece
        Consumed lazily, one piece per turn.
    before_turn : callable
        Called before each turn with the piece that starts in it, or None after the last one.
    """
    upcoming = iter(pieces)
    in_flight: list[Piece] = []
    while True:
        piece = next(upcoming, None)
        if piece is not None:
            in_flight.insert(0, piece)
        if not in_flight:
            return
        before_turn(piece)
        in_flight = [each for each in in_flight if next(each, _DONE) is not _DONE]
