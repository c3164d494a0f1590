"""Random programs over a coordinator: every call ends once, every error comes out once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from kinds import daily, examples

import dvkernels as dv
from dvkernels.errors import CallCancelledError, WorkerLostError

SECONDS = 30


class Fault(Exception):
    """An error that a call raises."""


class CoordinatorMachine(RuleBasedStateMachine):
    """Calls that add a number of their own to a variable, and what may have become of them."""

    def __init__(self) -> None:
        super().__init__()
        self.strategy = dv.ParameterServerStrategy(num_workers=3)
        with self.strategy.scope():
            self.table = dv.Variable(np.zeros(4, np.int64))
        self.coordinator = dv.ClusterCoordinator(self.strategy)
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, bool, dv.RemoteValue]] = []
        self.came_out: list[Fault] = []

    def call(self, kind: str, number: int, left: list[None]) -> int:
        assert self.gate.wait(SECONDS)
        self.table.scatter_add([number % 4], [1 << (number // 4)])
        if left:
            left.pop()
            raise WorkerLostError("lost")
        if kind == "raises":
            raise Fault(number)
        return number

    @rule(kind=st.sampled_from(["returns", "returns", "raises"]), lost=st.integers(0, 1))
    def schedule(self, kind: str, lost: int) -> None:
        number = len(self.calls)
        once = lost > 0
        if number >= 200:
            return
        arguments = (kind, number, [None] * lost)
        try:
            value = self.coordinator.schedule(self.call, arguments, once=once)
        except Fault as error:
            self.came_out.append(error)
        else:
            self.calls.append((kind, once, value))

    @rule()
    def hold_the_calls(self) -> None:
        self.gate.clear()

    @rule()
    def join(self) -> None:
        self.gate.set()
        try:
            self.coordinator.join()
        except Fault as error:
            self.came_out.append(error)
        else:
            assert self.coordinator.done()
            self.check_all()

    @rule()
    def close_and_go_on(self) -> None:
        self.gate.set()
        self.coordinator.close()
        self.drain()
        self.coordinator = dv.ClusterCoordinator(self.strategy)

    @invariant()
    def no_error_comes_out_twice(self) -> None:
        numbers = [error.args[0] for error in self.came_out]
        assert len({*numbers}) == len(numbers)

    def drain(self) -> None:
        while True:
            try:
                self.coordinator.join()
            except Fault as error:
                self.came_out.append(error)
            else:
                break
        self.check_all()

    def check_all(self) -> None:
        """Compare the ends of all calls with the variable and the errors."""
        expected, raised = np.zeros(4, np.int64), set()
        for number, (kind, once, value) in enumerate(self.calls):
            counts = not once
            try:
                assert value.fetch() == number
                assert kind == "returns"
                counts = True
            except Fault as error:
                raised.add(error.args[0] if kind == "raises" else -1)
            except CallCancelledError:
                counts = False
            expected[number % 4] += counts << (number // 4)
        assert {error.args[0] for error in self.came_out} == raised
        assert self.table.numpy().tolist() == expected.tolist()

    def teardown(self) -> None:
        self.gate.set()
        self.drain()
        self.strategy.close()


@pytest.mark.parametrize("steps", daily([12, 60], 12))
def test_every_call_ends_once_and_every_error_comes_out_once(steps):
    run_state_machine_as_test(
        CoordinatorMachine,
        settings=settings(max_examples=examples(24), stateful_step_count=steps, deadline=None),
    )


@pytest.mark.parametrize("num_calls", daily([600, 10_000], 600))
def test_cancelled_calls_are_all_accounted_for_in_the_end(num_calls):
    """1 % of the calls raise; what is cancelled is scheduled again until everything has ended."""
    with dv.ParameterServerStrategy(num_workers=5) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        with strategy.scope():
            made = dv.Variable(np.zeros(num_calls, np.int64))
        kills = {num_calls // 4, num_calls // 2, 3 * num_calls // 4}

        def call(number):
            if number in kills:
                kills.discard(number)
                raise WorkerLostError("killed")
            made.scatter_add([number], [1])
            if number % 100 == 50:
                raise Fault(number)
            return number

        came_out, ended, values = [], {}, {}
        pending = [*range(num_calls)]
        while pending or values:
            try:
                while pending:
                    values[pending[-1]] = coordinator.schedule(call, (pending[-1],), once=True)
                    pending.pop()
                coordinator.join()
            except Fault as error:
                came_out.append(error.args[0])
                continue
            for number, value in values.items():
                try:
                    ended[number] = value.fetch()
                except CallCancelledError:
                    pending.append(number)
                except Fault as error:
                    ended[number] = error.args[0]
            values = {}
    failing = [number for number in range(num_calls) if number % 100 == 50]
    assert sorted(came_out) == failing
    assert ended == {number: number for number in range(num_calls)}
    assert made.numpy().tolist() == [number % 100 != 50 for number in range(num_calls)]
