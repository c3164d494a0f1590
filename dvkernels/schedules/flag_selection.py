"""Which protocol a reduction between devices takes: decided from who reaches whose memory.

Ranks may wait for each other's flags only where each has a device of its own: two launches on one
device need not run at the same time. Else, and where the slots lie in memory of the host, the same
rows are launched one by one, and events stand for flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, NoReturn

from dvkernels.errors import DeviceError
from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_protocol import Protocol

__all__ = ["Reach", "Route", "choose", "meeting_nbytes", "ring_order"]

# reach[r][q]: whether the device of rank r can read and write memory of that of rank q.
Reach = Sequence[Sequence[bool]]

# What a wait costs and what a link moves, on NVLink of the fourth generation: published figures
# (see measuring between GPUs in docs/explanation/between-gpus.md), not measured here.
_WAIT_SECONDS = 3e-6
_LINK_RATE = 400e9


class Route(NamedTuple):
    """How a reduction goes: the protocol, the ranks in its order, and where its slots lie."""

    make: Callable[[int], Protocol]
    order: tuple[int, ...]  # which rank is the first, second, ... of the protocol
    waits: bool  # in the kernel, on flags; else launch by launch, with events
    slots: Literal["device", "host"] = "device"


def choose(
    reach: Reach,
    devices: Sequence[int],
    nbytes: int,
    algorithm: str = "auto",
    *,
    is_half: bool = False,
    shows_buffers: bool = True,
    is_captured: bool = False,
) -> Route:
    """Return the route of an all-reduce of ``nbytes`` a rank.

    Parameters
    ----------
    reach : Reach
        Who can use whose memory; a device reaches its own.
    devices : sequence of int
        The device of each rank.
    nbytes : int
        Bytes of a buffer.
    algorithm : {"auto", "direct", "ring"}
        ``"direct"`` adds left to right. So does ``"auto"``, unless only a ring is possible.
    is_half : bool
        Whether a ring would round at each step, and so must not be one.
    shows_buffers : bool
        Whether devices that reach each other reach these buffers too: memory of some pools is
        open to its own device only.
    is_captured : bool
        Whether the launches become part of a graph. Its replays would all bring the same epochs,
        and use the same slot, so a route with flags or slots is not taken.

    Raises
    ------
    DeviceError
        Captured, and there is no way without slots.

    Examples
    --------
    >>> everyone = [[True] * 4] * 4
    >>> choose(everyone, range(4), 4096).make.__name__
    'one_shot'
    >>> choose(everyone, range(4), 1 << 28).make.__name__
    'two_shot'
    """
    num_ranks = len(devices)
    ranks = tuple(range(num_ranks))
    waits = len({*devices}) == num_ranks and not is_captured
    small = nbytes <= meeting_nbytes(num_ranks) and not is_captured
    if all(all(row) for row in reach):
        if not shows_buffers:
            if is_captured:
                _raise_captured("their memory is of a pool that is closed to other GPUs")
            return Route(
                flag_all_reduce.one_shot if small else flag_all_reduce.staged, ranks, waits
            )
        if algorithm == "ring":
            return Route(flag_all_reduce.chain if is_half else flag_all_reduce.ring, ranks, waits)
        return Route(flag_all_reduce.one_shot if small else flag_all_reduce.two_shot, ranks, waits)
    order = ring_order(reach)
    if order is not None and algorithm != "direct" and shows_buffers and not is_half:
        # A rank reads its left-hand neighbour, and stores flags into memory of both.
        tells = all(reach[order[place - 1]][rank] for place, rank in enumerate(order))
        return Route(flag_all_reduce.ring, order, waits and tells)
    if is_captured:
        _raise_captured("these GPUs do not reach each other's memory")
    return Route(flag_all_reduce.staged, ranks, False, "host")


def _raise_captured(why: str) -> NoReturn:
    raise DeviceError(
        f"an all-reduce of buffers on several GPUs cannot become part of a CUDA graph here: {why}, "
        "so the data goes through memory that each call must have for itself; reduce outside the "
        "graph"
    )


def meeting_nbytes(num_ranks: int) -> int:
    """Return up to how many bytes one-shot is the quicker one.

    (p - 1) S / rate = wait + 2 (p - 1)/p S / rate, solved for S; of two ranks they move the same.

    >>> meeting_nbytes(4), meeting_nbytes(8)
    (800000, 228571)
    """
    if num_ranks <= 2:
        return round(_WAIT_SECONDS * _LINK_RATE)
    return round(_WAIT_SECONDS * _LINK_RATE / ((num_ranks - 1) * (1 - 2 / num_ranks)))


def ring_order(reach: Reach) -> tuple[int, ...] | None:
    """Return the ranks in an order where each reaches the one before it, and the first the last.

    None where there is no such ring. Tried one after another: of 16 ranks that is quick where
    there are rings, and where some rank reaches nobody.
    """
    num_ranks = len(reach)
    if not all(any(reach[r][q] for q in range(num_ranks) if q != r) for r in range(num_ranks)):
        return None if num_ranks > 1 else (0,)

    def extend(path: list[int]) -> list[int] | None:
        if len(path) == num_ranks:
            return path if reach[path[0]][path[-1]] else None
        for rank in range(num_ranks):
            if rank not in path and reach[rank][path[-1]]:
                found = extend([*path, rank])
                if found is not None:
                    return found
        return None

    found = extend([0])
    return tuple(found) if found else None
