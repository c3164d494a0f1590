"""Saved state of an iterator: its position, and the description of the pipeline.

A *lane* is the list of files that one worker read when the epoch began: see
:class:`dvkernels.data.distributed.worker_shards.FileShards`.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dvkernels.data.batch import Batch
from dvkernels.data.checks import check_count
from dvkernels.data.cursor import EpochPosition
from dvkernels.data.map import Application
from dvkernels.data.node import Node
from dvkernels.data.prefetch import Prefetch
from dvkernels.data.repeat import Repeat
from dvkernels.data.state_encoding import decode, encode
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []

_FORMAT = "dvkernels.data.iterator"
_KEYS = ("format", "version", "epoch", "position", "pipeline")
# Version 2 adds the resume points of the nodes (key "memory"), version 3 the position in each lane
# of files. They are written only where needed, so that older releases read all that they can.
_MEMORY, _LANES = "memory", "lanes"
_VERSION, _VERSION_WITH_MEMORY, _VERSION_WITH_LANES = 1, 2, 3
# Optional checks of the data; releases that do not know these keys rightly refuse the state.
_ELEMENT, _FINGERPRINT = "element", "fingerprint"
_EXTRA = {_VERSION_WITH_MEMORY: _MEMORY, _VERSION_WITH_LANES: _LANES}
# The states of several workers with datasets of their own.
_WORKERS_FORMAT = "dvkernels.data.iterators_of_workers"
_WORKERS_KEYS = ("format", "version", "epoch", "workers")
_FORMATS = {
    _FORMAT: "an iterator",
    _WORKERS_FORMAT: "several workers with datasets of their own",
}
_MEMBER = "load_state_dict"


class SavedPosition(NamedTuple):
    """Saved position: in the epoch, in each lane of files if there are lanes, and in which data."""

    epoch_position: EpochPosition
    lanes: list[int] | None = None
    element: str | None = None  # the outline of an element, if one had been delivered
    fingerprint: str | None = None


def write_state(
    node: Node,
    epoch_position: EpochPosition,
    lanes: Sequence[int] | None,
    element: str | None,
    fingerprint: str | None,
) -> dict[str, Any]:
    """Return the state as a JSON-serializable dict."""
    _check_resumable("state_dict", node)
    epoch, position, memory = epoch_position
    version = _VERSION
    extra: dict[str, Any] = {}
    if lanes is not None:
        version, extra = _VERSION_WITH_LANES, {_LANES: list(lanes)}
    elif memory:
        version, extra = _VERSION_WITH_MEMORY, {_MEMORY: encode(list(memory), _MEMORY)}
    if element is not None:
        extra[_ELEMENT] = element
    if fingerprint is not None:
        extra[_FINGERPRINT] = fingerprint
    values = (_FORMAT, version, epoch, position, list(node.pipeline))
    return dict(zip(_KEYS, values, strict=True)) | extra


def write_workers_state(
    node: Node, epoch: int, states: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """Return one state for several workers that have datasets of their own.

    ``node`` is the pipeline of this worker. The state of a worker that cannot be resumed is None.
    """
    _check_resumable("state_dict", node)
    if None in states:
        raise DatasetError(
            f"state_dict: expected datasets whose iterators can be resumed; that of worker "
            f"{states.index(None)} cannot: it is live, or the state of its reader cannot be saved; "
            f"keep what arrives in a file and read that with from_files, or leave out of the state "
            f"all that is no number, text, bytes or array"
        )
    return {
        "format": _WORKERS_FORMAT,
        "version": _VERSION,
        "epoch": epoch,
        "workers": copy.deepcopy(list(states)),
    }


def read_workers_state(
    node: Node, state: object, num_workers: int
) -> tuple[int, list[dict[str, Any]]]:
    """Return the epoch and the states of the workers, an empty list if no step had been taken."""
    _check_resumable(_MEMBER, node)
    frame = _check_frame(state, _WORKERS_FORMAT, _WORKERS_KEYS, (), _VERSION)
    epoch = _count("epoch", frame["epoch"])
    states = frame["workers"]
    if not isinstance(states, list) or len(states) not in (0, num_workers):
        got = f"{len(states)} workers" if isinstance(states, list) else brief(states)
        raise DatasetError(
            f"{_MEMBER}: expected the state of {num_workers} workers; got that of {got}: "
            f"distribute_datasets_from_function makes each worker a dataset of its own, which only "
            f"as many workers can continue; start with as many, or use distribute_dataset"
        )
    return epoch, states


def read_state(node: Node, state: object) -> SavedPosition:
    """Return the saved position; raise :class:`DatasetError` unless it is a state of ``node``."""
    _check_resumable(_MEMBER, node)
    optional_keys = (_MEMORY, _LANES, _ELEMENT, _FINGERPRINT)
    state = _check_frame(state, _FORMAT, _KEYS, optional_keys, max(_EXTRA))
    version, epoch = state["version"], _count("epoch", state["epoch"])
    position = _count("position", state["position"])
    _compare(node, state["pipeline"], epoch, position)
    optional = [state.get(key) for key in (_ELEMENT, _FINGERPRINT)]
    if not all(value is None or isinstance(value, str) for value in optional):
        raise _damage(f"text as {_ELEMENT} and {_FINGERPRINT}", brief(optional))
    for number, key in _EXTRA.items():
        if (version == number) != (key in state):
            raise _damage(
                f"{key!r} in a state of version {number}, and in no other",
                f"version {version}, {brief(state.get(key))}",
            )
    if version == _VERSION_WITH_LANES:
        return SavedPosition(EpochPosition(epoch, position), _read_lanes(state[_LANES]), *optional)
    if node.length is not None and position > node.length:
        wanted = f"a position of at most {node.length}, the number of elements an epoch"
        raise _damage(wanted, str(position))
    memory = decode(state.get(_MEMORY, []))
    if not isinstance(memory, list):
        raise _damage(f"a list {_MEMORY!r}", brief(memory))
    if memory:
        rest = iter(memory)
        node.own_chain().restore(rest)  # Only to check that it can be restored.
        if num_left := len(list(rest)):
            wanted = f"a {_MEMORY} of {len(memory) - num_left} entries for this pipeline"
            raise _damage(wanted, str(len(memory)))
    return SavedPosition(EpochPosition(epoch, position, memory), None, *optional)


def _check_frame(
    state: object, form: str, keys: Sequence[str], optional: Sequence[str], newest: int
) -> Mapping[str, Any]:
    """Return ``state`` if its format, its keys and its version are those of ``form``."""
    if not isinstance(state, Mapping):
        raise DatasetError(
            f"{_MEMBER}: expected the dict that state_dict() returned; got a "
            f"{type(state).__name__}; if it is JSON text, read it with json.loads first"
        )
    found = state.get("format", form)
    if not isinstance(found, str) or found != form:
        kind = _FORMATS.get(str(found), "something else")
        raise DatasetError(
            f"{_MEMBER}: expected the format {form!r}, the state of {_FORMATS[form]}; got "
            f"{brief(found)}, that of {kind}; pass what state_dict() returned for a dataset built "
            f"and distributed in the same way"
        )
    missing = [key for key in keys if key not in state]
    unknown = [str(key) for key in state if key not in (*keys, *optional)]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"also has {', '.join(unknown)}"] if unknown else []
        raise DatasetError(
            f"{_MEMBER}: expected the keys {', '.join(keys)}; the state {' and '.join(faults)}; "
            "pass what state_dict() returned"
        )
    version = check_count(_MEMBER, "version", state["version"], 1)
    if version > newest:
        raise DatasetError(
            f"{_MEMBER}: expected a version from {_VERSION} to {newest}; got {version}; "
            "a newer dvkernels wrote this state: update to read it"
        )
    return state


def _read_lanes(lanes: object) -> list[int]:
    """Return the position in each lane of files."""
    if not isinstance(lanes, list) or not lanes:
        wanted = f"{_LANES!r} to be a list of positions, one for each lane of files"
        raise _damage(wanted, brief(lanes))
    return [_count(_LANES, position) for position in lanes]


def _count(name: str, value: object) -> int:
    return check_count(_MEMBER, name, value, 0, "the state is damaged")


def _damage(wanted: str, got: str) -> DatasetError:
    return DatasetError(f"{_MEMBER}: expected {wanted}; got {got}; the state is damaged")


def _check_resumable(member: str, node: Node) -> None:
    if node.why_not_resumable is not None:
        raise DatasetError(
            f"{member}: expected a dataset whose iterators can be resumed; got {node!r}; "
            f"{node.why_not_resumable}"
        )


def check_same(what: str, own: str | None, saved: str | None) -> None:
    """Raise :class:`DatasetError` if the data are known to differ from those of the state."""
    if own is not None and saved is not None and own != saved:
        raise DatasetError(
            f"{_MEMBER}: expected the data that the state was saved for; their {what} was {saved} "
            f"and is {own} here; build the dataset as it was, or start afresh"
        )


def _compare(node: Node, saved: object, epoch: int, position: int) -> None:
    if not isinstance(saved, list | tuple) or not all(isinstance(link, str) for link in saved):
        raise _damage("the pipeline to be a list of strings", brief(saved))
    own = node.pipeline
    links = enumerate(itertools.zip_longest(own, saved, fillvalue="nothing"))
    differing = [(index, here, there) for index, (here, there) in links if here != there]
    if not differing:
        return
    index, here, there = differing[0]
    hint = "build the dataset as it was, or start afresh"
    if len(differing) == 1 and (repeat := re.fullmatch(r"repeat\((\d+)\)", there)):
        if epoch == 0 and _continues_repeat(node, len(own) - 1 - index, position, int(repeat[1])):
            return
        hint = "the count of a last repeat() may grow in its first epoch; otherwise " + hint
    raise DatasetError(
        f"{_MEMBER}: expected the state of the same pipeline; link {index} was {there} "
        f"when it was saved and is {here} here (saved: {'.'.join(saved)}; here: "
        f"{'.'.join(own)}); {hint}"
    )


def _continues_repeat(node: Node, num_behind: int, position: int, saved_count: int) -> bool:
    """Return whether a position stays valid under a ``repeat`` whose count has grown.

    ``map`` and ``batch`` may follow the ``repeat``, but no batch may have been cut short by the
    end that ``saved_count`` set.
    """
    chain = [link for link in node.links() if not isinstance(link, Prefetch)]
    behind, repeat = chain[:num_behind], chain[num_behind]
    if not isinstance(repeat, Repeat) or not all(
        isinstance(link, Application | Batch) for link in behind
    ):
        return False
    if repeat.count is not None and repeat.count < saved_count:
        return False
    batches = [link for link in behind if isinstance(link, Batch)]
    length = repeat.source.length
    rows = position * math.prod(batch.size for batch in batches)
    return not batches or (length is not None and rows <= length * saved_count)
