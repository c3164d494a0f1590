"""Call of a coordinator that runs on this thread, and the random generators of calls."""

from __future__ import annotations

from contextvars import ContextVar

import numpy as np

from dvkernels.philox import StrategyGenerators

__all__: list[str] = []

# The index of the worker, and the number of the call.
current_call: ContextVar[tuple[int, int] | None] = ContextVar("dvkernels_call", default=None)


class CallGenerators(StrategyGenerators):
    """Random generators keyed by the number of the call, and not by the worker that makes it."""

    __slots__ = ()

    def of_replica(self, rank: int, replica_id: int, name: str) -> np.random.Generator:
        """Return the generator of the call under way; outside of calls, of the step."""
        call = current_call.get()
        if call is None:
            return super().of_replica(rank, replica_id, name)
        return self.of_item(*call, name)
