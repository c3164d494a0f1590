"""What every protocol of waiting ranks must do, ours and others'."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from dvkernels.schedules.flag_protocol import NUM_SLOTS, Protocol
from dvkernels.testing import happens_before, moves
from dvkernels.testing.interleaving import RankInterpreter, Spin

__all__ = ["check_protocols"]

_DEADLINE = Spin(has_deadline=True)


def check_protocols(
    makers: Sequence[Callable[[int], Protocol]],
    *,
    num_slots: int = NUM_SLOTS,
    spin: Spin = _DEADLINE,
    most_ranks: int = 5,
    num_seeds: int = 2,
) -> None:
    """Assert the laws of all-reduces whose ranks wait for each other's flags.

    Parameters
    ----------
    makers : sequence of callable
        Each returns a protocol for so many ranks. Calls of any of them may follow each other on
        the same flags and slots.
    num_slots : int
        How many slots alternate.
    spin : Spin
        How waits end that are not answered.
    most_ranks : int
        Up to how many ranks to try.
    num_seeds : int
        How many random orders to try of each case that is too large for every order.

    Raises
    ------
    AssertionError
        A law is broken; the message tells who did what, and the moves before.

    Notes
    -----
    For 1 to ``most_ranks`` ranks, in place and apart, and any two calls in a row: no rank waits
    forever, and signals and waits order all uses of memory, so nothing is read before its flag, or
    overwritten before it is read; hence the same for any number of calls
    (:mod:`dvkernels.testing.happens_before`).

    Up to three ranks, in every order in which they can move, and beyond in random ones, three
    calls in a row with long sleeps: every result contains every contribution of its own call
    exactly once.

    Up to three ranks, in a call of each protocol, and of two ranks in two: wherever a rank gives
    up, wherever an abort comes from outside, and wherever a rank stops for good, all others leave,
    and no result is wrong that is read while nobody has aborted.

    Examples
    --------
    >>> from dvkernels.schedules import flag_all_reduce
    >>> from dvkernels.testing import check_protocols
    >>> check_protocols([flag_all_reduce.one_shot, flag_all_reduce.ring], most_ranks=3)
    """
    for num_ranks in range(1, most_ranks + 1):
        made = [make(num_ranks) for make in makers]
        for protocol in made:
            _check_one_thread(protocol)
        sequences: list[tuple[Protocol, ...]] = [*itertools.product(made, repeat=2)]
        alone: list[tuple[Protocol, ...]] = [(protocol,) for protocol in made]
        if num_ranks <= 2:
            alone += [(protocol, protocol) for protocol in made]
        sequences += alone
        for calls, in_place in itertools.product(sequences, (False, True)):
            programs = moves.programs(calls, in_place=in_place, num_slots=num_slots)
            where = f"{' then '.join(call.name for call in calls)} of {num_ranks} ranks"
            where += ", in place" if in_place else ""
            try:
                happens_before.check_order(programs)
                if num_ranks <= 3:
                    RankInterpreter(programs).run_every_order()
                else:
                    thrice = (*calls, calls[0])
                    longer = moves.programs(thrice, in_place=in_place, num_slots=num_slots)
                    for seed in range(num_seeds):
                        RankInterpreter(longer).run_at_random(seed)
                if num_ranks <= 3 and calls in alone:
                    _check_leaving(programs, spin)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from None


def _check_one_thread(protocol: Protocol) -> None:
    """Assert that one thread gets every row once, those of each rank in order."""
    found: list[list[int]] = [[] for _ in protocol.rows]
    for rank, number in protocol.in_order():
        found[rank].append(number)
    expected = [[*range(len(rows))] for rows in protocol.rows]
    assert found == expected, f"{protocol.name}: one thread gets rows {found}"


def _check_leaving(programs: moves.Programs, spin: Spin) -> None:
    RankInterpreter(programs, spin).run_every_order()
    patient = spin._replace(has_deadline=False)
    RankInterpreter(programs, patient, aborts_from_outside=True).run_every_order()
    for rank, own in enumerate(programs.moves):
        for at in range(len(own)):
            RankInterpreter(programs.stopping(rank, at), spin).run_every_order()
