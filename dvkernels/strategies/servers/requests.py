"""Requests to a table of which several servers have blocks of rows: their parts, and the answer.

A request is one of the functions that a server of this process is asked to call
(``table_server.py``). The table below says for each of them how its arrays are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.optimizers.optimizer import Optimizer
from dvkernels.optimizers.row_gradient import RowGradient
from dvkernels.variables.rows import gather_first
from dvkernels.variables.scatter import apply_updates
from dvkernels.variables.synchronization import taken, write_alike

__all__: list[str] = []


class Block(NamedTuple):
    """Rows of a variable that one server has."""

    server: int  # its rank
    first: int
    end: int


class SlotKey(NamedTuple):
    """Key of an optimizer slot, instead of that of a variable."""

    optimizer: Any
    variable: int  # its key
    name: str


class DividedRequest(NamedTuple):
    """Parts of a request, ``(block, arguments)``, and the function that joins the answers."""

    parts: list[tuple[int, tuple[Any, ...]]]
    join: Callable[[list[Any]], Any]


def divided(request: Any, blocks: Sequence[Block], arguments: tuple[Any, ...]) -> DividedRequest:
    """Divide a request for a table among the blocks of its rows."""
    division = _DIVISIONS[_function_of(request)]
    return division(blocks, *arguments)


def is_known(request: Any) -> bool:
    """Return whether a request can be sent to another process."""
    return _function_of(request) in _DIVISIONS


def _function_of(request: Any) -> Any:
    function = getattr(request, "func", request)  # of a partial, and of a method
    return getattr(function, "__func__", function)


def _read(blocks: Sequence[Block]) -> DividedRequest:
    parts: list[tuple[int, tuple[Any, ...]]] = [(k, ()) for k in range(len(blocks))]

    def join(answers: list[Any]) -> Any:
        whole = answers[0] if len(answers) == 1 else np.concatenate(answers)
        whole.flags.writeable = False
        return whole

    return DividedRequest(parts, join)


def _gather(blocks: Sequence[Block], rows: HostArray, target: Any) -> DividedRequest:
    flat = rows.reshape(-1)
    chosen = _chosen(blocks, flat)
    parts = [(k, (flat[places] - blocks[k].first, None)) for k, places in chosen]

    def join(answers: list[Any]) -> Any:
        like = answers[0]
        if target is None and len(answers) == 1:
            return like.reshape(*rows.shape, *like.shape[1:])
        shape = (*rows.shape, *like.shape[1:])
        found = np.empty(shape, like.dtype) if target is None else target
        is_flat = found.flags.c_contiguous
        lines = (
            found.reshape(-1, *like.shape[1:])
            if is_flat
            else np.empty((len(flat), *like.shape[1:]), like.dtype)
        )
        for (_, places), answer in zip(chosen, answers, strict=True):
            lines[places] = answer
        if not is_flat:
            found[...] = lines.reshape(shape)
        return found

    return DividedRequest(parts, join)


def _write(blocks: Sequence[Block], verb: str, value: Any) -> DividedRequest:
    return DividedRequest([(k, (verb, _rows_of(value, b))) for k, b in enumerate(blocks)], _nothing)


def _scatter(
    blocks: Sequence[Block], verb: str, indices: HostArray, updates: Any
) -> DividedRequest:
    parts = [
        (k, (verb, indices[places] - blocks[k].first, updates[places]))
        for k, places in _chosen(blocks, indices)
    ]
    return DividedRequest(parts, _nothing)


def _step(blocks: Sequence[Block], gradient: Any) -> DividedRequest:
    """Divide a gradient; every block takes part, so that all count the same steps."""
    if not isinstance(gradient, RowGradient):
        parts = [(k, (_rows_of(gradient, block),)) for k, block in enumerate(blocks)]
        return DividedRequest(parts, _nothing)
    chosen = dict(_chosen(blocks, gradient.rows))
    none: Any = slice(0, 0)
    parts = []
    for k, block in enumerate(blocks):
        places = chosen.get(k, none)
        rows = gradient.rows[places] - block.first
        parts.append((k, (RowGradient(rows, gradient.slopes[places]),)))
    return DividedRequest(parts, _nothing)


def _steps(blocks: Sequence[Block], steps: Any) -> DividedRequest:
    return DividedRequest([(k, (steps,)) for k in range(len(blocks))], lambda answers: answers[0])


def _rows_of(value: Any, block: Block) -> Any:
    return value[block.first : block.end] if value.ndim else value


def _chosen(blocks: Sequence[Block], indices: HostArray) -> list[tuple[int, Any]]:
    """Return for each block that has some of the rows their positions, in order."""
    if len(blocks) == 1 or len(indices) == 0:
        return [(0, slice(None))]
    starts = [block.first for block in blocks[1:]]
    of_block = np.searchsorted(starts, indices, side="right")
    return [(int(k), np.flatnonzero(of_block == k)) for k in np.unique(of_block)]


def _nothing(_: list[Any]) -> None:
    return None


_DIVISIONS: dict[Any, Callable[..., DividedRequest]] = {
    taken: _read,
    gather_first: _gather,
    write_alike: _write,
    apply_updates: _scatter,
    Optimizer.step_at_server: _step,
    Optimizer.steps_at_server: _steps,
}
