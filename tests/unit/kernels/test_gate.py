"""Gates between two threads: their states, and no lost hand-over."""

from __future__ import annotations

import threading

from dvkernels.kernels.cpu.engine import gate


def test_the_states_of_a_gate() -> None:
    state = gate.new_state(2)
    assert state.ctypes.data % 64 == 0
    assert gate.await_gate(state, -1, 0, 5, 0) == 0  # now SLEEPING
    assert gate.open_gate(state, 0) == gate.SLEEPING
    assert gate.await_gate(state, -1, 0, 5, 0) == 1
    gate.close_gate(state, 0)
    assert gate.open_gate(state, 0) == gate.CLOSED
    assert gate.open_and_await(state, 1, 0, 5) == gate.CLOSED + 4
    gate.close_gate(state, 0)
    assert gate.open_and_await(state, 1, 0, 5) == gate.OPEN


def test_no_hand_over_is_lost() -> None:
    state, num_turns = gate.new_state(2), 3000
    wakes = [threading.Semaphore(0), threading.Semaphore(0)]

    def play(own: int) -> None:
        for turn in range(num_turns):
            is_woken = (own == 0 or turn > 0) and gate.open_gate(state, 1 - own) == gate.SLEEPING
            if is_woken:  # the first turn is player 0's
                wakes[1 - own].release()
            if not gate.await_gate(state, -1, own, 20, 0):
                assert wakes[own].acquire(timeout=20)
            gate.close_gate(state, own)
        if own == 1 and gate.open_gate(state, 0) == gate.SLEEPING:
            wakes[0].release()

    threads = [threading.Thread(target=play, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
