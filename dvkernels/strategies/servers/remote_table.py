"""Remote table: the rows of a variable in server processes, and the requests to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

from dvkernels.errors import ContextError
from dvkernels.strategies.servers import requests
from dvkernels.strategies.servers.client import ServerClient
from dvkernels.strategies.servers.requests import Block
from dvkernels.variables.synchronization import taken
from dvkernels.variables.table_server import postpone

__all__: list[str] = []

T = TypeVar("T")


@final
class RemoteTable:
    """Rows of one variable, in blocks on servers; a ``Server``.

    Attributes
    ----------
    key : int or SlotKey
        The number of the variable in the job.
    blocks : tuple of Block
        In the order of the rows.
    """

    __slots__ = ("_client", "blocks", "key", "shards")

    def __init__(self, client: ServerClient, key: Any, blocks: Sequence[Block]) -> None:
        self._client = client
        self.key = key
        self.blocks = tuple(blocks)
        self.shards = tuple(range(block.first, block.end) for block in blocks)

    def ask(self, what: str, request: Callable[..., T], copies: Any, *arrays: Any) -> T:
        """Return what the servers answer to a request, each for its rows."""
        if request == type(copies).duplicate:
            return request(copies)
        if not requests.is_known(request):
            raise ContextError(
                f"{what} of variable {copies.name!r}, whose rows lie in other processes: a "
                f"function cannot hold them while it computes; use assign_add, scatter_* or an "
                f"optimizer"
            )
        asked, join = self.divided(what, request, arrays)
        answer: T = join(self._client.ask(f"{what} of variable {copies.name!r}", asked))
        return answer

    def divided(
        self, what: str, request: Any, arrays: tuple[Any, ...]
    ) -> tuple[list[tuple[int, tuple[Any, ...]]], Callable[[list[Any]], Any]]:
        """Return the requests to servers, and the function that joins their answers."""
        divided = requests.divided(request, self.blocks, arrays)
        asked = [
            (self.blocks[k].server, (what, request, self.key, *arguments))
            for k, arguments in divided.parts
        ]
        return asked, divided.join

    def apply(self, what: str, request: Callable[..., None], copies: Any, *arrays: Any) -> None:
        """Carry out a request that writes; in a call whose writes count once, when it returns."""
        if not postpone(self, what, request, copies, *arrays):
            self.ask(what, request, copies, *arrays)

    def apply_together(self, writes: Sequence[tuple[Any, ...]]) -> None:
        """Apply writes of several variables; each server gets one message."""
        asked: list[tuple[int, tuple[Any, ...]]] = []
        for table, what, request, copies, *arrays in writes:
            if not postpone(table, what, request, copies, *arrays):
                asked += table.divided(what, request, tuple(arrays))[0]
        if asked:
            names = ", ".join(repr(copies.name) for _, _, _, copies, *_ in writes[:8])
            self._client.ask(f"{writes[0][1]} of variables {names}", asked)

    def read(self, copies: Any) -> Any:
        """Return the content."""
        return self.ask("read_value", taken, copies)
