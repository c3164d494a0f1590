"""Shielded calls: results, errors, interrupts, and threads that cannot be started."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from dvkernels.threads import shielded


def test_results_and_errors_are_those_of_the_function() -> None:
    assert shielded.beyond_interrupts(divmod, 7, 3) == (2, 1)
    error = LookupError("mine")

    def fail() -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        shielded.beyond_interrupts(fail)
    assert caught.value is error


def test_what_a_call_refers_to_is_freed_without_a_collection() -> None:
    class Owner:
        def act(self) -> None: ...

    owner = Owner()
    ref = weakref.ref(owner)
    gc.collect()
    gc.disable()
    try:
        shielded.uninterrupted(owner.act)
        del owner
        end = time.monotonic() + 5
        while ref() is not None and time.monotonic() < end:
            time.sleep(0.001)  # the thread that made the call is about to end
        assert ref() is None
    finally:
        gc.enable()


def test_only_the_main_thread_needs_another() -> None:
    assert shielded.beyond_interrupts(threading.get_ident) != threading.get_ident()
    seen = []

    def elsewhere() -> None:
        seen.append(shielded.beyond_interrupts(threading.get_ident) == threading.get_ident())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]


def test_an_interrupt_ends_the_wait_and_not_the_call() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        signal.raise_signal(signal.SIGINT)  # handled by the main thread, whoever raises it
        go_on.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        shielded.beyond_interrupts(work)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(60)


def test_without_a_thread_the_caller_makes_the_call(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shielded._thread, "start_new_thread", fail)
    assert shielded.beyond_interrupts(threading.get_ident) == threading.get_ident()


def test_a_thread_that_never_begins_is_not_waited_for(monkeypatch) -> None:
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(shielded._thread, "start_new_thread", lambda begin, _: late.append(begin))
    monkeypatch.setattr(shielded, "_BEGIN_SECONDS", 0.01)
    calls: list[int] = []
    shielded.beyond_interrupts(calls.append, 1)
    assert calls == [1]
    monkeypatch.undo()
    late[0]()  # the call has been made before
    assert calls == [1]
