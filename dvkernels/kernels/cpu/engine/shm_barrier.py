"""Epoch barrier of processes in shared memory, which also compares the collectives they call.

Each round has an epoch, its number. The memory has a control line of eight words for each member,
written by that member only:

    [0] epoch of the latest round at which the member has arrived
    [1] [2] fingerprint of its call in an even, in an odd round, which must be equal for all
    [3] [4] bytes of its payload in an even, in an odd round

A member arrives at round k + 1 only after it has seen all others at round k, so its words of round
k stay readable until it arrives at round k + 2: words for two rounds are enough.
"""

from __future__ import annotations

from typing import Any

from numba import types

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics

__all__ = [
    "AGREED",
    "ENDED",
    "LATE",
    "MISMATCHED",
    "arrive",
    "arrive_at",
    "await_members",
    "await_round",
]


# Outcomes of a wait: all arrived with one fingerprint; some have not arrived; some have arrived
# with another fingerprint; the group has ended.
AGREED, LATE, MISMATCHED, ENDED = 0, 1, 2, 3


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def await_members(lines, count, rank, epoch, num_pauses):  # type: ignore[no-untyped-def]
    """Spin at most ``num_pauses`` times until all members have arrived; return the outcome.

    Word -8 of the lines is set when the group ends.
    """
    word = 1 + (epoch & 1)
    mine = intrinsics.load_shared(lines + 64 * rank, word)
    outcome = 0
    turn = 0
    for member in range(count):
        line = lines + 64 * member
        while intrinsics.load_shared(line, 0) < epoch:
            if intrinsics.load_shared(lines, -8) != 0:
                return 3
            if turn >= num_pauses:
                return 1
            intrinsics.relax(turn)
            turn += 1
        if intrinsics.load_shared(line, word) != mine:
            outcome = 2
    # Checked last: the fingerprint of a member that has ended the group does not count.
    if intrinsics.load_shared(lines, -8) != 0:
        return 3
    return outcome


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def arrive_at(lines, rank, epoch, fingerprint, nbytes):  # type: ignore[no-untyped-def]
    """Publish a call's fingerprint and bytes, and arrive at the round ``epoch``."""
    line = lines + 64 * rank
    intrinsics.store_shared(line, 1 + (epoch & 1), fingerprint)
    intrinsics.store_shared(line, 3 + (epoch & 1), nbytes)
    intrinsics.store_shared(line, 0, epoch)
    return 0


# The same for Python: a call of the function behind the dispatcher is cheaper.
await_round: Any = await_members.get_overload((types.int64,) * 5)
arrive: Any = arrive_at.get_overload((types.int64,) * 5)
