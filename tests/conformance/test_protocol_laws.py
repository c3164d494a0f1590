"""The protocols keep the laws of the package, and the laws find what breaks them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from model_checker import happens_before, moves
from model_checker.interleaving import RankInterpreter, Spin
from model_checker.protocol_laws import check_protocols

from dvkernels.schedules import flag_all_reduce
from dvkernels.schedules.flag_protocol import Combine, Protocol, Row, Signal, Wait

MAKERS = flag_all_reduce.PROTOCOLS
Rows = list[Row]


def changed(
    make: Callable[[int], Protocol], change: Callable[[Rows], object], ranks: slice = slice(None)
) -> Callable[[int], Protocol]:
    """Return the protocol with ``change`` applied to the rows of some ranks."""

    def wrong(num_ranks: int) -> Protocol:
        rows = [[*own] for own in make(num_ranks).rows]
        for own in rows[ranks]:
            change(own)
        return make(num_ranks)._replace(rows=tuple(map(tuple, rows)))

    return wrong


def positions(name: str, kind: type, num_ranks: int = 3) -> list[int]:
    rows = MAKERS[name](num_ranks).rows[0]
    return [at for at, row in enumerate(rows) if isinstance(row, kind)]


def each(kind: type) -> list[tuple[str, int]]:
    return [(name, at) for name in MAKERS for at in positions(name, kind)]


def check(make: Callable[[int], Protocol], **how: int) -> None:
    """Check three ranks by happens-before and by every interleaving, which must agree."""
    calls = [make(3)] * 3
    found = set()
    for in_place in (False, True):
        programs = moves.programs(calls, in_place=in_place, **how)
        for law in (
            happens_before.check_order,
            lambda those: RankInterpreter(those).run_every_order(),
        ):
            try:
                law(programs)
            except AssertionError as error:
                found.add((law.__name__, in_place))
                message = str(error)
    if found:
        # A missing happens-before edge shows in some interleaving of the moves.
        assert {place for law, place in found if law == "check_order"} == {
            place for law, place in found if law == "<lambda>"
        }
        raise AssertionError(message)


@pytest.mark.wide
def test_two_ranks_in_any_sequence_of_protocols() -> None:
    check_protocols([*MAKERS.values()], most_ranks=2)


@pytest.mark.parametrize("name", MAKERS)
def test_three_ranks_in_three_calls(name: str) -> None:
    check(MAKERS[name])


@pytest.mark.wide
def test_all_protocols_in_any_sequence() -> None:
    check_protocols([*MAKERS.values()])


@pytest.mark.slow
def test_all_protocols_of_eight_ranks() -> None:
    check_protocols([*MAKERS.values()], most_ranks=8, num_seeds=10)


@pytest.mark.parametrize(("name", "at"), each(Wait))
def test_every_wait_is_needed(name: str, at: int) -> None:
    with pytest.raises(AssertionError, match=r"comes first|expected|may still be"):
        check(changed(MAKERS[name], lambda rows: rows.pop(at), slice(1)))


@pytest.mark.parametrize(("name", "at"), each(Signal))
def test_every_signal_is_needed(name: str, at: int) -> None:
    # If only one rank lacks it, that rank's next signal may stand in for it, later.
    with pytest.raises(AssertionError, match="deadlock"):
        check(changed(MAKERS[name], lambda rows: rows.pop(at)))


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, at in each(Combine) if (name, at + 1) in each(Signal)]
)
def test_a_signal_before_its_write_is_found(name: str, at: int) -> None:
    def swap(rows: Rows) -> None:
        rows[at], rows[at + 1] = rows[at + 1], rows[at]

    with pytest.raises(AssertionError, match=r"comes first|expected"):
        check(changed(MAKERS[name], swap))


@pytest.mark.parametrize("name", MAKERS)
def test_epochs_that_do_not_grow_are_found(name: str) -> None:
    with pytest.raises(AssertionError, match=r"comes first|expected"):
        check(lambda num_ranks: MAKERS[name](num_ranks)._replace(num_stages=0))


@pytest.mark.parametrize("name", ["one_shot", "staged"])
def test_one_slot_instead_of_two_is_found(name: str) -> None:
    with pytest.raises(AssertionError, match=r"comes first|expected"):
        check(MAKERS[name], num_slots=1)


@pytest.mark.parametrize("name", MAKERS)
def test_a_contribution_that_is_added_twice_is_found(name: str) -> None:
    at = next(
        at for at, row in enumerate(MAKERS[name](3).rows[0]) if getattr(row, "completes", False)
    )

    def twice(rows: Rows) -> None:
        row = rows[at]
        assert isinstance(row, Combine)
        rows[at] = row._replace(sources=(*row.sources, row.sources[0]))

    with pytest.raises(AssertionError, match="expected"):
        RankInterpreter(
            moves.programs([changed(MAKERS[name], twice)(3)], in_place=False)
        ).run_every_order()


@pytest.mark.parametrize("name", MAKERS)
def test_without_deadline_and_abort_a_lost_rank_stops_the_others(name: str) -> None:
    programs = moves.programs([MAKERS[name](2)], in_place=False).stopping(1, 0)
    with pytest.raises(AssertionError, match="deadlock"):
        RankInterpreter(programs).run_every_order()
    RankInterpreter(programs, Spin(has_deadline=True)).run_every_order()


@pytest.mark.parametrize("name", MAKERS)
def test_a_rank_that_gives_up_without_an_abort_or_ignores_one_is_found(name: str) -> None:
    programs = moves.programs([MAKERS[name](2)] * 2, in_place=True)
    deaf, silent = Spin(hears_abort=False), Spin(has_deadline=True, aborts_others=False)
    with pytest.raises(AssertionError, match="expected"):
        RankInterpreter(programs, silent).run_every_order()
    with pytest.raises(AssertionError, match="deadlock"):
        RankInterpreter(programs.stopping(1, 0), deaf, aborts_from_outside=True).run_every_order()
