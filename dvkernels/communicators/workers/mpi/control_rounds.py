"""Rounds over messages: every worker learns what all bring, two numbers and now and then a text.

Numbers are 16 bytes a worker. Texts follow in rounds in which a worker has one, so that a thousand
workers receive 16 KB in nearly every round, and not half a MB.
"""

from __future__ import annotations

from typing import final

import numpy as np

from dvkernels.communicators.workers.consistency import Vote
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint

__all__: list[str] = []

_TEXT_NBYTES = 496
_HAS_TEXT = -1  # instead of how many bytes, of which there are none then


@final
class ControlRounds:
    """One worker's side of the rounds, one after another; a request, which says whether it is over.

    Parameters
    ----------
    traffic : PointToPoint
        What else it gathers begins and ends between rounds.
    """

    def __init__(self, traffic: PointToPoint) -> None:
        self._own, self._own_text = np.zeros(2, np.int64), np.zeros(_TEXT_NBYTES, np.uint8)
        self._all = np.zeros((traffic.size, 2), np.int64)
        self._all_texts = np.zeros((traffic.size, _TEXT_NBYTES), np.uint8)
        # The same buffers in every round, so they are set up once.
        self._heads = traffic.gather(self._own.view(np.uint8), self._all.view(np.uint8))
        self._texts = traffic.gather(self._own_text, self._all_texts)
        self._has_texts = False

    def start(self, number: int, nbytes: int, text: str = "") -> None:
        """Bring something to the next round, when the last one is over; text or bytes."""
        held = text.encode(errors="replace")[: _TEXT_NBYTES - 1]
        self._own_text[: len(held)] = np.frombuffer(held, np.uint8)
        self._own_text[len(held)] = 0
        self._own[:] = number, _HAS_TEXT if text else nbytes
        self._has_texts = bool(text)
        self._heads.Start()
        if text:  # the others need not wait until this worker looks again
            self._texts.Start()

    def Test(self) -> bool:
        """Tell whether all have brought theirs."""
        if not self._heads.Test():
            return False
        if not self._has_texts and (self._all[:, 1] == _HAS_TEXT).any():
            self._has_texts = True
            self._texts.Start()
        return not self._has_texts or bool(self._texts.Test())

    def words(self) -> list[Vote]:
        """Return what all have brought."""
        return [Vote(number, max(nbytes, 0)) for number, nbytes in self._all.tolist()]

    def text_of(self, worker: int) -> str:
        """Return the text that a worker has brought, if it has brought one."""
        if self._all[worker, 1] != _HAS_TEXT:
            return ""
        held: bytes = self._all_texts[worker].tobytes()
        return held[: held.index(0)].decode(errors="replace")
