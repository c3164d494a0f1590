"""Selection of the protocol of a reduction between devices, by their peer access.

Ranks may wait for each other's flags only where each has a device of its own, and launches return
before their kernels have ended: else two launches need not run at the same time. Otherwise, and
where the slots lie in host memory, the same rows are launched one by one, and events take the place
of flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, NoReturn

from dvkernels.errors import DeviceError
from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_protocol import Protocol

__all__ = ["AccessMatrix", "Route", "choose", "crossover_nbytes", "ring_order"]

# reach[r][q]: whether the device of rank r can read and write memory of the device of rank q.
AccessMatrix = Sequence[Sequence[bool]]

# Time of a wait and rate of a link, on NVLink of the fourth generation: published figures (see
# measuring between GPUs in docs/explanation/between-gpus.md), not measured here.
_WAIT_SECONDS = 3e-6
_LINK_RATE = 400e9


class Route(NamedTuple):
    """Choice for a reduction: the protocol, the ranks in its order, and the memory of its slots."""

    make: Callable[[int], Protocol]
    order: tuple[int, ...]  # the first, second, ... rank of the protocol
    waits: bool  # True: kernels wait on flags; False: launch by launch, with events
    slots: Literal["device", "host"] = "device"


def choose(
    reach: AccessMatrix,
    devices: Sequence[int],
    nbytes: int,
    algorithm: str = "auto",
    *,
    is_half: bool = False,
    buffers_reachable: bool = True,
    is_captured: bool = False,
    launches_block: bool = False,
) -> Route:
    """Return the route of an all-reduce of ``nbytes`` per rank.

    ``"direct"`` adds left to right, and so does ``"auto"``, unless only a ``"ring"`` is possible. A
    ring would round half types (``is_half``) at each step. Buffers are not reachable, even with
    peer access, where their pool is open to its own device only. Raise ``DeviceError`` for launches
    that are captured into a graph where there is no route without flags and slots: the replays
    would all have the same epochs and the same slot.

    >>> everyone = [[True] * 4] * 4
    >>> choose(everyone, range(4), 4096).make.__name__
    'one_shot'
    >>> choose(everyone, range(4), 1 << 28).make.__name__
    'two_shot'
    """
    num_ranks = len(devices)
    ranks = tuple(range(num_ranks))
    waits = len({*devices}) == num_ranks and not is_captured and not launches_block
    small = nbytes <= crossover_nbytes(num_ranks) and not is_captured
    if all(all(row) for row in reach):
        if not buffers_reachable:
            if is_captured:
                _raise_captured("their memory is of a pool that is closed to other GPUs")
            return Route(
                flag_all_reduce.one_shot if small else flag_all_reduce.staged, ranks, waits
            )
        if algorithm == "ring":
            return Route(flag_all_reduce.chain if is_half else flag_all_reduce.ring, ranks, waits)
        return Route(flag_all_reduce.one_shot if small else flag_all_reduce.two_shot, ranks, waits)
    order = ring_order(reach)
    if order is not None and algorithm != "direct" and buffers_reachable and not is_half:
        # A rank reads memory of its left-hand neighbour, and stores flags into memory of both.
        can_signal = all(reach[order[k - 1]][rank] for k, rank in enumerate(order))
        return Route(flag_all_reduce.ring, order, waits and can_signal)
    if is_captured:
        _raise_captured("these GPUs do not reach each other's memory")
    return Route(flag_all_reduce.staged, ranks, False, "host")


def _raise_captured(why: str) -> NoReturn:
    raise DeviceError(
        f"an all-reduce of buffers on several GPUs cannot become part of a CUDA graph here: {why}, "
        "so the data goes through memory that each call must have for itself; reduce outside the "
        "graph"
    )


def crossover_nbytes(num_ranks: int) -> int:
    """Return the bytes up to which one-shot is faster than two-shot.

    It solves (p - 1) S / rate = wait + 2 (p - 1)/p S / rate for S; of two ranks both move the same.

    >>> crossover_nbytes(4), crossover_nbytes(8)
    (800000, 228571)
    """
    if num_ranks <= 2:
        return round(_WAIT_SECONDS * _LINK_RATE)
    return round(_WAIT_SECONDS * _LINK_RATE / ((num_ranks - 1) * (1 - 2 / num_ranks)))


def ring_order(reach: AccessMatrix) -> tuple[int, ...] | None:
    """Return the ranks in an order in which each reaches its predecessor, the first the last.

    None where there is no such ring. The search backtracks: for 16 ranks it is fast where there
    are rings, and where some rank reaches no other.
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
