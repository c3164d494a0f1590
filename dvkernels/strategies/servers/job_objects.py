"""Objects of a job that all processes refer to: variables, optimizers and the strategy."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, final

from dvkernels.errors import ContextError
from dvkernels.optimizers.optimizer import Optimizer
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.servers.client import ServerClient
from dvkernels.strategies.servers.remote_copies import RemoteCopies
from dvkernels.strategies.servers.remote_table import RemoteTable
from dvkernels.strategies.servers.requests import Block, SlotKey
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation
from dvkernels.variables.request_counts import RequestCounts, RequestTotals
from dvkernels.variables.variable import Variable, new_variable, storage_of

__all__: list[str] = []

_MOST_DROPPED_NAMES = 1000


class VariableRecord(NamedTuple):
    """All that a worker needs to know of a variable."""

    key: Any  # an int, or a SlotKey
    blocks: tuple[Block, ...]
    name: str
    shape: tuple[int, ...]
    dtype: Any
    trainable: bool
    aggregation: VariableAggregation


class _Optimizers:
    """Optimizers by key, one object for each in a process."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._numbers = itertools.count()
        self._keys: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]]
        self._keys = weakref.WeakKeyDictionary()
        self._own: weakref.WeakValueDictionary[tuple[int, int], Optimizer]
        self._own = weakref.WeakValueDictionary()
        self._of_others: dict[tuple[int, int], Optimizer] = {}

    def reference_of(
        self, optimizer: Optimizer, drop: Callable[[tuple[int, int]], None]
    ) -> tuple[Any, ...]:
        key = self._keys.get(optimizer)
        if key is None:
            key = self._keys[optimizer] = (self._rank, next(self._numbers))
            self._own[key] = optimizer
            weakref.finalize(optimizer, drop, key).atexit = False
        return ("optimizer", key, type(optimizer), optimizer.settings())

    def resolve(self, key: tuple[int, int], kind: type[Optimizer], settings: Any) -> Optimizer:
        found = self._own.get(key)
        if found is not None:  # its settings are those of this process
            return found
        found = self._of_others.get(key)
        if found is None:
            found = self._of_others[key] = object.__new__(kind)
            super(Optimizer, found).__init__()
            self._keys[found] = key
        vars(found).update(settings)
        return found

    def drop(self, key: tuple[int, int]) -> None:
        self._of_others.pop(key, None)


@final
class ClientObjects:
    """Objects of the coordinator or of a worker; ``References``."""

    def __init__(self, rank: int, strategy: Any, client: ServerClient) -> None:
        self._strategy = weakref.ref(strategy)
        self._client = client
        self._optimizers = _Optimizers(rank)
        self._variables: weakref.WeakValueDictionary[int, Variable]
        self._variables = weakref.WeakValueDictionary()

    def reference_of(self, value: Any) -> tuple[Any, ...] | None:
        """Return the reference of an object; None for one that is sent by value."""
        if isinstance(value, Variable):
            copies = storage_of(value)
            if isinstance(copies, RemoteCopies) and copies.placement is self.placement:
                key = copies.table.key
                self._variables[key] = value
                record = VariableRecord(
                    key, copies.table.blocks, value.name, value.shape, value.dtype,
                    value.trainable, value.aggregation,
                )  # fmt: skip
                return ("variable", record)
        elif isinstance(value, Optimizer):
            if self.placement is not None:
                value.states_elsewhere = self.placement.optimizer_states
            return self._optimizers.reference_of(value, self._client.drop)
        elif isinstance(value, Strategy) and value is self._strategy():
            return ("strategy",)
        return None

    def resolve(self, reference: tuple[Any, ...]) -> Any:
        """Return what this process has for a reference."""
        kind, *about = reference
        if kind == "variable":
            record = VariableRecord(*about[0])
            found = self._variables.get(record.key)
            if found is None:
                found = self._variables[record.key] = self._variable_of(record)
            return found
        return self._optimizers.resolve(*about) if kind == "optimizer" else self._strategy()

    @property
    def placement(self) -> Any:
        """The placement of the strategy; None when it is gone."""
        strategy = self._strategy()
        return None if strategy is None else strategy.placement

    def _variable_of(self, record: VariableRecord) -> Variable:
        strategy = self._strategy()
        assert strategy is not None
        if isinstance(record.key, int):
            self._client.name(record.key, record.name, record.blocks)
        copies = RemoteCopies(
            RemoteTable(self._client, record.key, record.blocks),
            record.shape,
            record.dtype,
            strategy.placement,
            record.name,
            record.aggregation,
        )
        return new_variable(copies, record.trainable)


@final
class ServerObjects:
    """Objects of a server: its rows of the variables, and the optimizers that change them."""

    def __init__(self, rank: int) -> None:
        self._optimizers = _Optimizers(rank)
        self.variables: dict[int, Variable] = {}
        self.counts: dict[int, RequestCounts] = {}
        self._names: dict[int, str] = {}  # also of some that have been dropped, for messages
        self.busy_seconds = 0.0
        self.most_waiting = 0  # processes, at one time

    def add(self, key: int, variable: Variable) -> None:
        """Add a variable, of which this server has rows."""
        self.variables[key], self.counts[key] = variable, RequestCounts()
        self._names[key] = variable.name

    def variable(self, key: int) -> Variable:
        """Return the variable of a key.

        Raises
        ------
        ContextError
            It has been dropped.
        """
        found = self.variables.get(key)
        if found is None:
            raise ContextError(
                f"variable {self._names.get(key, key)!r} is gone: the coordinator has no reference "
                f"to it any more; keep one while calls use it"
            )
        return found

    def totals(self) -> RequestTotals:
        """Return the counts of all variables together."""
        total = RequestTotals()
        for counts in self.counts.values():
            total = total.plus(counts.totals)
        return total

    def storage(self, key: Any) -> Copies:
        """Return the copies of the variable, or of the slot, of a key."""
        if not isinstance(key, SlotKey):
            return storage_of(self.variable(key))
        slots = key.optimizer.slots(self.variable(key.variable))
        return storage_of(slots[key.optimizer.slot_names.index(key.name)])

    def slotted(self, optimizer: Optimizer) -> dict[int, int]:
        """Return the variables of which an optimizer has slots here, with their step counts."""
        keys = {id(variable): key for key, variable in self.variables.items()}
        return {keys[id(v)]: int(optimizer.steps(v)) for v in optimizer.slotted if id(v) in keys}

    def drop(self, key: Any) -> None:
        """Drop the variable, or the optimizer, of a key that no other process has any more."""
        self.variables.pop(key, None)
        self.counts.pop(key, None)
        while len(self._names) > len(self.variables) + _MOST_DROPPED_NAMES:
            oldest = next(iter(self._names))
            name = self._names.pop(oldest)
            if oldest in self.variables:
                self._names[oldest] = name
        self._optimizers.drop(key)

    def reference_of(self, value: Any) -> None:
        """Return None: a server sends arrays and errors only."""

    def resolve(self, reference: tuple[Any, ...]) -> Any:
        """Return what this server has for a reference."""
        kind, *about = reference
        if kind == "variable":
            return self.variable(about[0][0])
        if kind == "optimizer":
            return self._optimizers.resolve(*about)
        raise ContextError("a request to a server refers to the strategy, which is not there")
