"""Fast path of repeated reductions: contiguous arrays of one shape and dtype on one GPU.

The host's share of a call (descriptions, checks, the table: 45 us) is the same each time but for
the addresses of the arrays. So the first call of a signature caches its launch here, and the next
ones check that no two arrays overlap, fill in the addresses, and launch: 5 us.

A cached launch stays valid: it consists of words and holds no handle of the driver.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from dvkernels.devices import signature, stream_order
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cuda.engine import job, launcher, table_layout
from dvkernels.reduce_op import Reduction

__all__ = ["CallSignature", "describe", "learn", "repeat"]

_MAX_LAUNCHES = 1024  # in the cache: 1 KiB each


class CallSignature(NamedTuple):
    """Signature of a call: the key of its cached launch, and its arrays."""

    key: Hashable
    num_sources: int
    is_in_place: bool
    arrays: signature.Signature


class _CachedLaunch(NamedTuple):
    nbytes: int  # of each array
    launch: launcher.RepeatedLaunch


_launches: dict[Hashable, _CachedLaunch] = {}
# The driver does not serve a forked child, whose calls must take the slow path, which says so.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_launches.clear)


def describe(sources: Sequence[Any], targets: Sequence[Any], op: Any) -> CallSignature | None:
    """Return the signature of a reduction into ``targets``, or in place if there are none.

    None: such a call is never cached.
    """
    described = signature.read([*sources, *targets] if targets else sources)
    if described is None or described.is_read_only:
        return None
    key = (described.kind, len(sources), len(targets), op)
    try:
        hash(key)
    except TypeError:  # not an op
        return None
    return CallSignature(key, len(sources), not targets, described)


def repeat(call: CallSignature | None, verb: str, stream: Any) -> bool:
    """Launch a call whose signature is cached; False: declined, and nothing was touched."""
    if call is None or type(stream) in (list, tuple):
        return False
    cached = _launches.get(call.key)
    if cached is None:
        return False
    addresses, end = call.arrays.addresses, 0
    for address in sorted(addresses):
        if address < end or address % table_layout.VECTOR_NBYTES:
            return False
        end = address + cached.nbytes
    work_stream = call.arrays.stream if stream is None else stream_order.stream_handle(verb, stream)
    cached.launch(addresses, work_stream)
    return True


def learn(call: CallSignature | None, op: Reduction, arrays: Sequence[HostArray]) -> None:
    """Cache the launch of a call that has passed all checks, with these arrays."""
    if call is None:
        return
    device = call.arrays.kind[-1]
    launch = job.repeated(device, op, arrays, call.num_sources, in_place=call.is_in_place)
    if launch is None:
        return
    if len(_launches) >= _MAX_LAUNCHES:
        for key in [*_launches][:1]:  # the oldest; another thread may remove it too
            _launches.pop(key, None)
    _launches[call.key] = _CachedLaunch(arrays[0].nbytes, launch)
