"""Control rounds over MPI: an all-gather of all workers' votes, and sometimes of texts.

A vote has 16 bytes. Texts follow in a second all-gather, only in rounds in which some worker has
one, so a thousand workers receive 16 KB in nearly every round instead of half a MB.
"""

from __future__ import annotations

from typing import final

import numpy as np

from dvkernels.communicators.workers.consistency import Vote
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint
from dvkernels.communicators.workers.shm.segment import read_text, write_text

__all__: list[str] = []

_TEXT_NBYTES = 496
_HAS_TEXT = -1  # in place of the byte count, which is 0 in a vote with a text


@final
class ControlRounds:
    """One worker's side of the control rounds; other all-gathers of ``p2p`` come between rounds."""

    def __init__(self, p2p: PointToPoint) -> None:
        self._own, self._own_text = np.zeros(2, np.int64), np.zeros(_TEXT_NBYTES, np.uint8)
        self._all = np.zeros((p2p.size, 2), np.int64)
        self._all_texts = np.zeros((p2p.size, _TEXT_NBYTES), np.uint8)
        # The same buffers in every round, so the all-gathers are persistent.
        self._heads = p2p.all_gather(self._own.view(np.uint8), self._all.view(np.uint8))
        self._texts = p2p.all_gather(self._own_text, self._all_texts)
        self._has_texts = False

    def start(self, number: int, nbytes: int, text: str = "") -> None:
        """Vote in the next round, once the last one is complete; with a text, or with bytes."""
        write_text(self._own_text, text)
        self._own[:] = number, _HAS_TEXT if text else nbytes
        self._has_texts = bool(text)
        self._heads.Start()
        if text:  # now: other workers should not wait for this worker's next Test
            self._texts.Start()

    def Test(self) -> bool:
        """Return whether the votes (and texts) of all workers are here."""
        if not self._heads.Test():
            return False
        if not self._has_texts and (self._all[:, 1] == _HAS_TEXT).any():
            self._has_texts = True
            self._texts.Start()
        return not self._has_texts or bool(self._texts.Test())

    def votes(self) -> list[Vote]:
        """Return the votes of all workers."""
        return [Vote(number, max(nbytes, 0)) for number, nbytes in self._all.tolist()]

    def text_of(self, worker: int) -> str:
        """Return the text of a worker's vote, or ""."""
        return read_text(self._all_texts[worker]) if self._all[worker, 1] == _HAS_TEXT else ""
