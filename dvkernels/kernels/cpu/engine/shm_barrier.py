"""Epoch barrier of threads or processes that share memory, which also compares their calls.

Each round has an epoch, its number, and each member a control line, written by that member only:
the latest epoch at which it has arrived, and its votes in the latest even and odd round. A vote is
the fingerprint of a call, which must be equal for all members, and a word that they need not share.

A member arrives at round k + 1 only after it has seen all others at round k, so its vote of round
k stays readable until it arrives at round k + 2: votes of two rounds are enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, records

__all__: list[str] = []


# Outcomes of a wait: all arrived with one fingerprint; some have not arrived; some have arrived
# with another fingerprint; the group has ended.
AGREED, LATE, MISMATCHED, ENDED = 0, 1, 2, 3


class _Line(NamedTuple):
    epoch: int


EPOCH = _Line._fields.index("epoch")  # for Python: the index of this word of a line


class _CallVote(NamedTuple):
    fingerprint: int
    word: int


class _End(NamedTuple):
    reason: int  # not 0: the group has ended


_line_at = records.nth(records.layout(_Line, nbytes=records.LINE_NBYTES))
_nth_vote = records.nth(records.layout(_CallVote))
_end_before = records.nth(records.layout(_End, nbytes=records.LINE_NBYTES))


@jit.njit(nogil=True)
def end_at(lines):  # type: ignore[no-untyped-def]
    """Return the record of the end of a group, on the cache line before the control lines."""
    return _end_before(lines, -1)


@jit.njit(nogil=True)
def vote_at(lines, member, epoch):  # type: ignore[no-untyped-def]
    """Return the vote of a member in a round."""
    return _nth_vote(lines + records.LINE_NBYTES * member + 8, epoch & 1)


@jit.njit(nogil=True)
def epoch_of(lines, member):  # type: ignore[no-untyped-def]
    """Return the latest epoch at which a member has arrived."""
    return intrinsics.load_shared(_line_at(lines, member), "epoch")


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def await_members(lines, count, rank, epoch, num_pauses):  # type: ignore[no-untyped-def]
    """Spin at most ``num_pauses`` times until all members have arrived; return the outcome."""
    end = end_at(lines)
    mine = intrinsics.load_shared(vote_at(lines, rank, epoch), "fingerprint")
    outcome = AGREED
    turn = 0
    for member in range(count):
        while epoch_of(lines, member) < epoch:
            if intrinsics.load_shared(end, "reason") != 0:
                return ENDED
            if turn >= num_pauses:
                return LATE
            intrinsics.relax(turn)
            turn += 1
        if intrinsics.load_shared(vote_at(lines, member, epoch), "fingerprint") != mine:
            outcome = MISMATCHED
    # Checked last: the fingerprint of a member that has ended the group does not count.
    if intrinsics.load_shared(end, "reason") != 0:
        return ENDED
    return outcome


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def arrive_at(lines, rank, epoch, fingerprint, word):  # type: ignore[no-untyped-def]
    """Publish a vote, and arrive at the round ``epoch``."""
    vote = vote_at(lines, rank, epoch)
    intrinsics.store_shared(vote, "fingerprint", fingerprint)
    intrinsics.store_shared(vote, "word", word)
    intrinsics.store_shared(_line_at(lines, rank), "epoch", epoch)
    return 0


# The same for Python: a call of the function behind the dispatcher is cheaper.
await_round: Any = await_members.get_overload((types.int64,) * 5)
arrive: Any = arrive_at.get_overload((types.int64,) * 5)


def vote_of(line: HostArray, epoch: int) -> tuple[int, int]:
    """Return the fingerprint and the word of a member's vote in a round."""
    first = 1 + len(_CallVote._fields) * (epoch & 1)
    return int(line[first]), int(line[first + 1])
