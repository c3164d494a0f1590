"""The state of an iterator: a position, and the pipeline that it is a position in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from dvkernels.data.checks import check_count
from dvkernels.data.node import Node
from dvkernels.errors import DatasetError

__all__ = ["read_state", "write_state"]

_FORMAT = "dvkernels.data.iterator"
_VERSION = 1
_KEYS = ("format", "version", "epoch", "position", "pipeline")
_MEMBER = "load_state_dict"


def write_state(node: Node, epoch: int, position: int) -> dict[str, Any]:
    """Return the state as a dict of strings, integers and one list of strings."""
    values = (_FORMAT, _VERSION, epoch, position, list(node.pipeline))
    return dict(zip(_KEYS, values, strict=True))


def read_state(node: Node, state: object) -> tuple[int, int]:
    """Return (epoch, position); raise :class:`DatasetError` unless it is a state of ``node``."""
    if not isinstance(state, Mapping):
        raise DatasetError(
            f"{_MEMBER}: expected the dict that state_dict() returned; got a "
            f"{type(state).__name__}; if it is JSON text, read it with json.loads first"
        )
    missing = [key for key in _KEYS if key not in state]
    unknown = [str(key) for key in state if key not in _KEYS]
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
    if version != _VERSION:
        raise DatasetError(
            f"{_MEMBER}: expected version {_VERSION}; got {version}; "
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
    return epoch, position


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
