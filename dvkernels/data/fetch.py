"""Fetching of the elements of an epoch: computed on demand, or prefetched by a thread."""

from __future__ import annotations

from typing import Any

from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.error_policy import SkippedElements, skipping
from dvkernels.data.node import Node
from dvkernels.data.prefetch import Prefetcher, prefetch_depth

__all__ = ["Fetcher"]


class Fetcher:
    """Source of the elements of one epoch; elements count as delivered once they are confirmed.

    Parameters
    ----------
    node : Node
        The last node of the pipeline.
    epoch_position : EpochPosition
        Where to begin.
    prefetch : int or None
        How many times ``count`` elements a thread keeps ready; None for the depth that the
        pipeline asks for.
    count : int
        How many elements are taken at a time.
    skips : SkippedElements or None
        Records failing elements; None to raise their errors.
    """

    def __init__(
        self,
        node: Node,
        epoch_position: EpochPosition,
        prefetch: int | None,
        count: int,
        skips: SkippedElements | None,
    ) -> None:
        self._cursor = Cursor(node)
        self._count = count
        self.skips = skips
        self.depth = prefetch_depth(node, prefetch)
        self.prefetcher = Prefetcher(node, 0, 0, self.depth * count, skips) if self.depth else None
        self.move_to(epoch_position)

    @property
    def epoch_position(self) -> EpochPosition:
        """The position behind the elements confirmed last."""
        return self._cursor.epoch_position

    def move_to(self, epoch_position: EpochPosition) -> None:
        """Move to another position; prefetched elements are dropped."""
        self._cursor.move_to(*epoch_position)
        if self.prefetcher is not None:
            self.prefetcher.move_to(*epoch_position)

    def take(self) -> list[Any]:
        """Return the next elements, fewer at the end; ``StopIteration`` if none.

        Unless they are confirmed, the next call returns them again.
        """
        if self.prefetcher is None:
            token = None if self.skips is None else skipping.set(self.skips)
            try:
                return self._cursor.peek_many(self._count)
            finally:
                if token is not None:
                    skipping.reset(token)
        if self.prefetcher.epoch_position != self._cursor.epoch_position:
            # The elements taken last were not confirmed.
            self.prefetcher.move_to(*self._cursor.epoch_position)
        found: list[Any] = []
        try:
            while len(found) < self._count:
                found.append(self.prefetcher.take())
        except StopIteration:
            if not found:
                raise
        except BaseException:
            self.prefetcher.move_to(*self._cursor.epoch_position)
            raise
        return found

    def confirm(self) -> None:
        """Count the elements taken last as delivered."""
        if self.prefetcher is None:
            self._cursor.advance()
        else:
            epoch, position, memory = self.prefetcher.epoch_position
            self._cursor.move_to(epoch, position, memory)

    def peek(self) -> Any:
        """Return the next element without moving; only without a prefetcher."""
        return self._cursor.peek()

    def stop(self) -> None:
        """Wake a thread that waits in :meth:`take`."""
        self._cursor.stop()
        if self.prefetcher is not None:
            self.prefetcher.stop()

    def close(self) -> None:
        """Release threads, workers and streams; :meth:`take` acquires them again."""
        epoch_position = self._cursor.epoch_position
        if self.prefetcher is not None:
            self.prefetcher.move_to(*epoch_position)
        self._cursor.close()
        self._cursor.move_to(*epoch_position)

    def wait(self) -> None:
        """Wait until the stopped prefetch thread has ended, unless user code blocks it."""
        if self.prefetcher is not None:
            self.prefetcher.wait()
