"""The short way of the common calls: dense arrays, alike, on one GPU, reduced in place or apart.

What a call costs on the host (descriptions, checks, the table: 45 us) is the same work each time,
for all but the addresses of its arrays. So the first call of a kind leaves its launch here, and
the next ones look whether any two arrays overlap, fill in their addresses, and launch: 5 us.

A launch that is kept relies on nothing that can go: it has words, and no handle of the driver.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import signature, stream_order
from dvkernels.kernels.cuda.engine import job, launcher
from dvkernels.reduce_op import Reduction

__all__ = ["Seen", "learn", "repeat", "see"]

_VECTOR_NBYTES = 16
_MOST = 1024  # launches that are kept: 1 KiB each


class Seen(NamedTuple):
    """A call at a glance."""

    key: Hashable
    num_sources: int
    is_in_place: bool
    at: signature.Signature


class _KeptLaunch(NamedTuple):
    nbytes: int  # of an array
    launch: launcher.RepeatedLaunch


_kept: dict[Hashable, _KeptLaunch] = {}
# The driver serves no child of fork: what that calls goes the long way, which says so.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)


def see(sources: Sequence[Any], targets: Sequence[Any], op: Any) -> Seen | None:
    """Return the call that reduces arrays into targets, or, if there are none, in place.

    None: it cannot be one that is kept.
    """
    found = signature.at([*sources, *targets] if targets else sources)
    if found is None:
        return None
    key = (found.kind, len(sources), len(targets), op)
    try:
        hash(key)
    except TypeError:  # an op that is none
        return None
    return Seen(key, len(sources), not targets, found)


def repeat(seen: Seen | None, verb: str, stream: Any) -> bool:
    """Launch a call that has been made before; False: declined, and nothing was touched."""
    if seen is None or type(stream) in (list, tuple):
        return False
    kept = _kept.get(seen.key)
    if kept is None:
        return False
    addresses, end = seen.at.addresses, 0
    for address in sorted(addresses):
        if address < end or address % _VECTOR_NBYTES:
            return False
        end = address + kept.nbytes
    home = seen.at.stream if stream is None else stream_order.pointer(verb, stream)
    kept.launch(addresses, home)
    return True


def learn(seen: Seen | None, op: Reduction, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Keep the launch of a call that has passed all checks; ``arrays`` are what it saw."""
    if seen is None:
        return
    launch = job.repeated(seen.at.device, op, arrays, seen.num_sources, in_place=seen.is_in_place)
    if launch is None:
        return
    if len(_kept) >= _MOST:
        for key in [*_kept][:1]:  # the oldest; other threads may be here too
            _kept.pop(key, None)
    _kept[seen.key] = _KeptLaunch(arrays[0].nbytes, launch)
