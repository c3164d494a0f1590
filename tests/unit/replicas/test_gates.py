"""Gates: no waiting thread misses an opening, and no opening wakes twice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dvkernels.devices import cpu
from dvkernels.replicas.gates import Gates

SPINS, SLEEPS = 1, 10_000  # numbers of threads: with and without a core each


@pytest.fixture(params=[SPINS, SLEEPS], ids=["spins", "sleeps"])
def num_threads(request: pytest.FixtureRequest) -> int:
    assert SPINS <= cpu.usable_cores() < SLEEPS
    return request.param


def test_initially_closed_then_open_until_closed(num_threads):
    gates = Gates(2, num_threads)
    gates.open(0)
    gates.open(0)  # no effect
    assert gates.wait(0, 0)
    assert gates.wait(0, 0)
    assert not gates.wait(1, 0.001)
    gates.close(0)
    assert not gates.wait(0, 0.001)


def test_closes_the_first_ones_only(num_threads):
    gates = Gates(3, num_threads)
    for gate in range(3):
        gates.open(gate)
    gates.close_first(2)
    assert [gates.wait(gate, 0.001) for gate in range(3)] == [False, False, True]


def test_a_wait_ends_at_its_timeout(num_threads):
    gates = Gates(1, num_threads)
    began = time.monotonic()
    assert not gates.wait(0, 0.1)
    assert 0.1 <= time.monotonic() - began < 20
    assert not gates.sleep(0, 0.01)  # times out too
    gates.open(0)
    assert gates.sleep(0, 0)


@pytest.mark.parametrize("handing_over", [False, True])
@pytest.mark.parametrize("seconds", [0, 0.05])  # the waiting thread still spins, or sleeps by then
def test_an_opening_lets_the_waiter_through(num_threads, seconds, handing_over):
    gates = Gates(2, num_threads)
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(gates.wait, 0, 20)
        time.sleep(seconds)
        if handing_over:
            gates.open_and_let_run(0, 1)
        else:
            gates.open(0)
        assert waiter.result(20)
    assert not gates.wait(1, 0)


def test_the_hand_over_ends_although_the_awaited_gate_stays_closed(num_threads):
    gates = Gates(2, num_threads)
    began = time.monotonic()
    for _ in range(100):
        gates.open_and_let_run(0, 1)
        gates.close(0)
    assert time.monotonic() - began < 20


def test_no_opening_is_lost(num_threads):
    gates, num_turns = Gates(2, num_threads), 2000
    played: list[int] = []

    def play(own: int) -> None:
        for turn in range(num_turns):
            assert gates.wait(own, 20), f"player {own} was not woken for turn {turn}"
            gates.close(own)
            played.append(own)
            if turn % 2:
                gates.open(1 - own)
            else:
                gates.open_and_let_run(1 - own, own)

    with ThreadPoolExecutor(2) as pool:
        players = [pool.submit(play, own) for own in (0, 1)]
        gates.open(0)
        for player in players:
            player.result(60)
    assert played == [0, 1] * num_turns


def test_of_several_openers_one_wakes(num_threads):
    gates, num_openers, num_rounds = Gates(1, num_threads), 3, 300
    start = threading.Barrier(num_openers + 1, timeout=20)
    end = threading.Barrier(num_openers + 1, timeout=20)

    def open_it() -> None:
        for _ in range(num_rounds):
            start.wait()
            gates.open(0)  # raises if two openers wake the waiting thread
            end.wait()

    with ThreadPoolExecutor(num_openers) as pool:
        openers = [pool.submit(open_it) for _ in range(num_openers)]
        for _ in range(num_rounds):
            start.wait()
            assert gates.wait(0, 20)
            end.wait()
            gates.close(0)
        for opener in openers:
            opener.result(20)


def test_an_interrupted_opening_can_be_repeated():
    gates = Gates(1, SLEEPS)
    compiled = gates._compiled

    class Interrupted:
        @staticmethod
        def open_gate(state, gate):
            compiled.open_gate(state, gate)
            raise KeyboardInterrupt  # Ctrl-C is handled as soon as the compiled call returns

    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(gates.wait, 0, 3)
        time.sleep(0.2)
        gates._compiled = Interrupted
        with pytest.raises(KeyboardInterrupt):
            gates.open(0)
        gates._compiled = compiled
        gates.open(0)  # as Rendezvous.fail does
        assert waiter.result(20), "the thread sleeps at an open gate"
