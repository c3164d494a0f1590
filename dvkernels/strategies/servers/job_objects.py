"""Objects of a job that all processes refer to: variables, optimizers and the strategy."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple, final

from dvkernels.errors import ContextError
from dvkernels.optimizers.optimizer import Optimizer
from dvkernels.strategies.base import Strategy
from dvkernels.strategies.servers.remote_copies import RemoteCopies
from dvkernels.strategies.servers.remote_table import RemoteTable
from dvkernels.strategies.servers.requests import Block
from dvkernels.variables.modes import VariableAggregation
from dvkernels.variables.variable import Variable, new_variable, storage_of

__all__: list[str] = []


class VariableRecord(NamedTuple):
    """All that a worker needs to know of a variable."""

    key: int
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
        self._of_others: dict[tuple[int, int], Optimizer] = {}

    def reference_of(self, optimizer: Optimizer) -> tuple[Any, ...]:
        key = self._keys.get(optimizer)
        if key is None:
            key = self._keys[optimizer] = (self._rank, next(self._numbers))
        optimizer.is_at_servers = True
        return ("optimizer", key, type(optimizer), optimizer.settings())

    def resolve(self, key: tuple[int, int], kind: type[Optimizer], settings: Any) -> Optimizer:
        found = self._of_others.get(key)
        if found is None:
            found = next((each for each, k in self._keys.items() if k == key), None)
        if found is None:
            found = self._of_others[key] = object.__new__(kind)
            super(Optimizer, found).__init__()
            self._keys[found] = key
        vars(found).update(settings)
        return found


@final
class ClientObjects:
    """Objects of the coordinator or of a worker; ``References``."""

    def __init__(self, rank: int, strategy: Any) -> None:
        self._strategy = weakref.ref(strategy)
        self._optimizers = _Optimizers(rank)
        self._variables: weakref.WeakValueDictionary[int, Variable]
        self._variables = weakref.WeakValueDictionary()

    def reference_of(self, value: Any) -> tuple[Any, ...] | None:
        """Return the reference of an object; None for one that is sent by value."""
        if isinstance(value, Variable):
            copies = storage_of(value)
            if isinstance(copies, RemoteCopies) and copies.placement is self._placement:
                key = copies.table.key
                self._variables[key] = value
                record = VariableRecord(
                    key, copies.table.blocks, value.name, value.shape, value.dtype,
                    value.trainable, value.aggregation,
                )  # fmt: skip
                return ("variable", record)
        elif isinstance(value, Optimizer):
            return self._optimizers.reference_of(value)
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
    def _placement(self) -> Any:
        strategy = self._strategy()
        return None if strategy is None else strategy.placement

    def _variable_of(self, record: VariableRecord) -> Variable:
        strategy = self._strategy()
        assert strategy is not None
        client = strategy.processes.client
        for block in record.blocks:
            client.servers[block.server].names[record.key] = record.name
        copies = RemoteCopies(
            RemoteTable(client, record.key, record.blocks),
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

    def reference_of(self, value: Any) -> None:
        """Return None: a server sends arrays and errors only."""

    def resolve(self, reference: tuple[Any, ...]) -> Any:
        """Return what this server has for a reference."""
        kind, *about = reference
        if kind == "variable":
            return self.variables[about[0][0]]
        if kind == "optimizer":
            return self._optimizers.resolve(*about)
        raise ContextError("a request to a server refers to the strategy, which is not there")
