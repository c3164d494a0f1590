"""Step of a replica that works on items of its own, in a function of ``strategy.map``."""

from __future__ import annotations

from typing import Any

from dvkernels.errors import ContextError
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCall
from dvkernels.replicas.rendezvous import Rendezvous

__all__: list[str] = []


class ItemStep(Rendezvous):
    """Rendezvous of a replica that works on items of its own, where it meets no other."""

    __slots__ = ("item_index",)

    def __init__(self) -> None:
        super().__init__(1)
        self.item_index = 0

    def meet(self, replica: int, request: CollectiveCall, is_observed: bool = False) -> Any:
        """Raise: there are no others to meet."""
        self.check_alive(request.verb)
        raise ContextError(
            f"{request.verb} was called in a function of strategy.map, for item "
            f"{self.item_index}: there each replica works on items of its own and meets no other; "
            f"return what is to be combined and combine the results, or use strategy.run"
        )

    def issue(self, replica: int, request: CollectiveCall) -> PendingCall:
        """Raise: there are no others to meet."""
        self.meet(replica, request)
        raise AssertionError
