"""Laws of all-reduce protocols by flags, those of the package and third-party ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from model_checker import happens_before, moves
from model_checker.interleaving import RankInterpreter, Spin

from dvkernels.schedules.flag_protocol import NUM_SLOTS, Protocol

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
    """Assert the laws of all-reduce protocols whose ranks synchronize by flags.

    Parameters
    ----------
    makers : sequence of callable
        Each returns a protocol, given the number of ranks. Calls of different protocols may follow
        each other on the same flags and slots.
    num_slots : int
        Number of slots that alternate.
    spin : Spin
        The end of waits whose signal does not come.
    most_ranks : int
        Largest number of ranks to test.
    num_seeds : int
        Number of random interleavings of each case that has too many to run all.

    Raises
    ------
    AssertionError
        A law is broken; the message names the ranks, and the moves that led there.

    Notes
    -----
    For 1 to ``most_ranks`` ranks, in place and out of place, and any two consecutive calls: no rank
    waits forever, and signals and waits order all uses of memory, so nothing is read before its
    flag is set, or overwritten before it is read. It follows for any number of calls
    (:mod:`model_checker.happens_before`).

    Up to three ranks, in all interleavings, and beyond in random ones of three consecutive calls
    with long suspensions: every result contains every contribution of its own call exactly once.

    Up to three ranks in one call of each protocol, and for two ranks in two calls: wherever a rank
    gives up, an abort comes from outside, or a rank stops forever, all other ranks exit, and every
    result that is read before an abort is right.

    Examples
    --------
    >>> from dvkernels.schedules import flag_all_reduce
    >>> from model_checker.protocol_laws import check_protocols
    >>> check_protocols([flag_all_reduce.one_shot, flag_all_reduce.ring], most_ranks=2)
    """
    for num_ranks in range(1, most_ranks + 1):
        protocols = [make(num_ranks) for make in makers]
        for protocol in protocols:
            _check_one_thread(protocol)
        sequences: list[tuple[Protocol, ...]] = [*itertools.product(protocols, repeat=2)]
        single_calls: list[tuple[Protocol, ...]] = [(protocol,) for protocol in protocols]
        if num_ranks <= 2:
            single_calls += [(protocol, protocol) for protocol in protocols]
        sequences += single_calls
        for calls, in_place in itertools.product(sequences, (False, True)):
            programs = moves.programs(calls, in_place=in_place, num_slots=num_slots)
            case = f"{' then '.join(call.name for call in calls)} of {num_ranks} ranks"
            case += ", in place" if in_place else ""
            try:
                happens_before.check_order(programs)
                if num_ranks <= 3:
                    RankInterpreter(programs).run_every_order()
                else:
                    three_calls = (*calls, calls[0])
                    longer = moves.programs(three_calls, in_place=in_place, num_slots=num_slots)
                    for seed in range(num_seeds):
                        RankInterpreter(longer).run_at_random(seed)
                if num_ranks <= 3 and calls in single_calls:
                    _check_leaving(programs, spin)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None


def _check_one_thread(protocol: Protocol) -> None:
    """Assert that one thread runs every row once, and those of each rank in order."""
    rows_run: list[list[int]] = [[] for _ in protocol.rows]
    for rank, number in protocol.in_order():
        rows_run[rank].append(number)
    expected = [[*range(len(rows))] for rows in protocol.rows]
    assert rows_run == expected, f"{protocol.name}: one thread gets rows {rows_run}"


def _check_leaving(programs: moves.Programs, spin: Spin) -> None:
    RankInterpreter(programs, spin).run_every_order()
    patient = spin._replace(has_deadline=False)
    RankInterpreter(programs, patient, aborts_from_outside=True).run_every_order()
    for rank, own in enumerate(programs.moves):
        for at in range(len(own)):
            RankInterpreter(programs.stopping(rank, at), spin).run_every_order()
