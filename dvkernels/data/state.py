"""The state of an iterator: a position, and the pipeline that it is a position in."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dvkernels.data.checks import check_count
from dvkernels.data.cursor import Place
from dvkernels.data.node import Node
from dvkernels.errors import DatasetError

__all__ = ["read_state", "write_state"]

_FORMAT = "dvkernels.data.iterator"
_KEYS = ("format", "version", "epoch", "position", "pipeline")
# Version 2 is version 1 and a memory. It is written only where there is one, so that what an
# older version can read it still reads.
_MEMORY = "memory"
_VERSION, _VERSION_WITH_MEMORY = 1, 2
_MEMBER = "load_state_dict"


def write_state(
    node: Node, epoch: int, position: int, memory: Sequence[Any] = ()
) -> dict[str, Any]:
    """Return the state as a dict that JSON can hold; the arguments are those of a ``Place``."""
    _check_resumable("state_dict", node)
    version = _VERSION_WITH_MEMORY if memory else _VERSION
    values = (_FORMAT, version, epoch, position, list(node.pipeline))
    state: dict[str, Any] = dict(zip(_KEYS, values, strict=True))
    if memory:
        state[_MEMORY] = copy.deepcopy(list(memory))
    return state


def read_state(node: Node, state: object) -> Place:
    """Return where to go; raise :class:`DatasetError` unless it is a state of ``node``."""
    _check_resumable(_MEMBER, node)
    if not isinstance(state, Mapping):
        raise DatasetError(
            f"{_MEMBER}: expected the dict that state_dict() returned; got a "
            f"{type(state).__name__}; if it is JSON text, read it with json.loads first"
        )
    missing = [key for key in _KEYS if key not in state]
    unknown = [str(key) for key in state if key not in (*_KEYS, _MEMORY)]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"also has {', '.join(unknown)}"] if unknown else []
        raise DatasetError(
            f"{_MEMBER}: expected the keys {', '.join(_KEYS)}; the state {' and '.join(faults)}; "
            "pass what state_dict() returned"
        )
    if state["format"] != _FORMAT:
        raise DatasetError(
            f"{_MEMBER}: expected the format {_FORMAT!r}; got {state['format']!r:.80}; "
            "this is the state of something else"
        )
    version = check_count(_MEMBER, "version", state["version"], 1)
    if version > _VERSION_WITH_MEMORY:
        raise DatasetError(
            f"{_MEMBER}: expected version {_VERSION} or {_VERSION_WITH_MEMORY}; got {version}; "
            "a newer dvkernels wrote this state: update to read it"
        )
    epoch = check_count(_MEMBER, "epoch", state["epoch"], 0, "the state is damaged")
    position = check_count(_MEMBER, "position", state["position"], 0, "the state is damaged")
    _compare(node.pipeline, state["pipeline"])
    if node.length is not None and position > node.length:
        raise DatasetError(
            f"{_MEMBER}: expected a position of at most {node.length}, the number of elements an "
            f"epoch; got {position}; the state is damaged"
        )
    memory = state.get(_MEMORY, [])
    if (version == _VERSION_WITH_MEMORY) != (_MEMORY in state) or not isinstance(memory, list):
        raise DatasetError(
            f"{_MEMBER}: expected a list {_MEMORY!r} in a state of version {_VERSION_WITH_MEMORY}, "
            f"and in no other; got version {version}, {memory!r:.80}; the state is damaged"
        )
    if memory:
        rest = iter(memory)
        node.own_chain().restore(rest)  # Only to see whether it can be done.
        if len(left := list(rest)):
            raise DatasetError(
                f"{_MEMBER}: expected a {_MEMORY} of {len(memory) - len(left)} entries for this "
                f"pipeline; got {len(memory)}; the state is damaged"
            )
    return Place(epoch, position, memory)


def _check_resumable(member: str, node: Node) -> None:
    if node.why_not_resumed is not None:
        raise DatasetError(
            f"{member}: expected a dataset whose iterators can be resumed; got {node!r}; "
            f"{node.why_not_resumed}"
        )


def _compare(own: tuple[str, ...], saved: object) -> None:
    if not isinstance(saved, list | tuple) or not all(isinstance(link, str) for link in saved):
        raise DatasetError(
            f"{_MEMBER}: expected the pipeline to be a list of strings; got {saved!r:.80}; "
            "the state is damaged"
        )
    for place, (mine, theirs) in enumerate(itertools.zip_longest(own, saved, fillvalue="nothing")):
        if mine != theirs:
            raise DatasetError(
                f"{_MEMBER}: expected the state of the same pipeline; link {place} was {theirs} "
                f"when it was saved and is {mine} here (saved: {'.'.join(saved)}; here: "
                f"{'.'.join(own)}); build the dataset as it was, or start afresh"
            )
