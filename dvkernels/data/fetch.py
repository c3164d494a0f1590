"""Where an iterator takes its elements from: computed when asked for, or ahead."""

from __future__ import annotations

from typing import Any

from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.error_policy import SkippedElements, skipping
from dvkernels.data.node import Node
from dvkernels.data.prefetch import Prefetcher
from dvkernels.data.transforms import prefetch_depth

__all__ = ["Fetcher"]


class Fetcher:
    """The elements of one epoch of a node; what has been taken counts when it is confirmed.

    Parameters
    ----------
    node : Node
    place : EpochPosition
        Where to begin.
    prefetch : int or None
        How many times ``count`` elements a thread holds ready; None for what the node asks for.
    count : int
        How many elements are taken at a time.
    skips : SkippedElements or None
        Where elements that fail are noted; None to raise their errors.
    """

    def __init__(
        self,
        node: Node,
        place: EpochPosition,
        prefetch: int | None,
        count: int,
        skips: SkippedElements | None,
    ) -> None:
        self._cursor = Cursor(node)
        self._count = count
        self.skips = skips
        self.depth = prefetch_depth(node, prefetch)
        self.ahead = Prefetcher(node, 0, 0, self.depth * count, skips) if self.depth else None
        self.move_to(place)

    @property
    def place(self) -> EpochPosition:
        """Behind what was confirmed last."""
        return self._cursor.place

    def move_to(self, place: EpochPosition) -> None:
        """Go to another place; what was held ready is forgotten."""
        self._cursor.move_to(*place)
        if self.ahead is not None:
            self.ahead.move_to(*place)

    def take(self) -> list[Any]:
        """Return the next elements, fewer at the end; ``StopIteration`` if none.

        Unless they are confirmed, the next call returns them again.
        """
        if self.ahead is None:
            token = None if self.skips is None else skipping.set(self.skips)
            try:
                return self._cursor.peek_many(self._count)
            finally:
                if token is not None:
                    skipping.reset(token)
        if self.ahead.place != self._cursor.place:  # the last ones were not confirmed
            self.ahead.move_to(*self._cursor.place)
        found: list[Any] = []
        try:
            while len(found) < self._count:
                found.append(self.ahead.take())
        except StopIteration:
            if not found:
                raise
        except BaseException:
            self.ahead.move_to(*self._cursor.place)
            raise
        return found

    def confirm(self) -> None:
        """Count what was taken last as delivered."""
        if self.ahead is None:
            self._cursor.advance()
        else:
            epoch, position, memory = self.ahead.place
            self._cursor.move_to(epoch, position, memory)

    def peek(self) -> Any:
        """Return the next element and stay; only where nothing is computed ahead."""
        return self._cursor.peek()

    def stop(self) -> None:
        """End the wait of another thread in :meth:`take`."""
        self._cursor.stop()
        if self.ahead is not None:
            self.ahead.stop()

    def close(self) -> None:
        """Let go of threads, workers and streams; taking more begins anew."""
        place = self._cursor.place
        if self.ahead is not None:
            self.ahead.move_to(*place)
        self._cursor.close()
        self._cursor.move_to(*place)

    def wait(self) -> None:
        """Wait until the thread that was let go of reads no more, unless user code keeps it."""
        if self.ahead is not None:
            self.ahead.wait()
