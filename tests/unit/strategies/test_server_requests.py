"""Requests to servers of other processes, in one process: channels, references, shared steps."""

from __future__ import annotations

import functools
import os
import signal
from collections import deque

import numpy as np
import pytest

import dvkernels as dv
from dvkernels import pickling
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.shm.ring_channel import RingChannel
from dvkernels.errors import CollectiveTimeoutError, ContextError
from dvkernels.kernels.cpu import message_ring
from dvkernels.optimizers.optimizer import check_steps
from dvkernels.strategies.servers import message
from dvkernels.strategies.servers.client import ServerClient
from dvkernels.strategies.servers.job_objects import ServerObjects, _Optimizers
from dvkernels.strategies.servers.processes import JobProcesses


class Plain:
    """References of a process that sends everything by value."""

    def reference_of(self, value):
        return None

    def resolve(self, reference):
        raise AssertionError


class FakeChannel(MessageChannel):
    """Server with room for so many pieces of a message at once, which answers when it has all."""

    def __init__(self, peer, log, num_pieces=1, on_receive=lambda: None):
        super().__init__(peer, "here", lambda: ("", False))
        self.log, self.num_pieces, self.on_receive = log, num_pieces, on_receive
        self.left, self.answers, self.is_owned = 0, deque(), False

    def post(self, parts):
        self.number = pickling.number_of(np.frombuffer(b"".join(parts), np.uint8))
        self.left = self.num_pieces
        self.flush()

    def flush(self):
        if self.left:
            self.left -= 1
            self.log.append(self.peer)
            if not self.left:
                answer = message.encode((None, [self.peer]), Plain(), self.number)
                self.answers.append(np.frombuffer(b"".join(answer), np.uint8))
        return not self.left

    def own_unsent(self):
        self.is_owned = True

    def receive(self):
        self.on_receive()
        return self.answers.popleft() if self.answers else None


def client_of(*channels, seconds=30.0, is_interruptible=False):
    client = ServerClient(channels, seconds, is_interruptible)
    client.references = Plain()
    return client


def test_a_server_gets_its_part_before_another_has_answered():
    log = []
    slow, other = FakeChannel(1, log, num_pieces=8), FakeChannel(2, log, num_pieces=4)
    other.answers.append(
        np.frombuffer(b"".join(message.encode((None, ["late"]), Plain(), 99)), np.uint8)
    )
    slow.on_receive = lambda: log.append("asked")
    client = client_of(slow, other)
    assert client.ask("read", [(1, ("read", 0, 0)), (2, ("read", 0, 0))]) == [1, 2]
    assert log.index("asked") >= 12  # all had been sent


def test_an_interrupt_ends_a_request_that_is_not_answered():
    count = [0]

    def interrupt_once():
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    channel = FakeChannel(1, [], num_pieces=10**9, on_receive=interrupt_once)
    client = client_of(channel, is_interruptible=True)
    with pytest.raises(KeyboardInterrupt):
        client.ask("assign", [(1, ("assign", 0, 0))])
    assert channel.is_owned
    channel.num_pieces = 1
    assert client.ask("read", [(1, ("read", 0, 0))]) == [1]


def test_a_write_that_timed_out_has_its_own_copy():
    outbox = np.zeros(message_ring.RING_NBYTES, np.uint8)
    inbox = np.zeros_like(outbox)
    here = RingChannel(1, "there", lambda: ("", False), inbox, outbox)
    there = RingChannel(0, "here", lambda: ("", False), outbox, inbox)
    written = np.ones(1 << 19)
    with pytest.raises(CollectiveTimeoutError, match="may still be carried out: read before"):
        client_of(here, seconds=0.02).ask("assign", [(1, ("assign", 0, 0, written))])
    written[:] = 2.0
    while (came := there.receive()) is None:
        here.flush()
    _, [(_, _, _, content)], _ = message.decode(came, Plain())
    assert content.nbytes == written.nbytes
    assert (content == 1.0).all()


def test_the_environment_shortens_the_wait(monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.02")
    client = client_of(FakeChannel(1, [], num_pieces=10**9), seconds=600)
    with pytest.raises(CollectiveTimeoutError, match=r"has not answered for 0\.02 s"):
        client.ask("read", [(1, ("read", 0, 0))])


def test_what_a_message_refers_to_is_listed():
    class OfArrays(Plain):
        def reference_of(self, value):
            return ("array",) if isinstance(value, np.ndarray) else None

    array, kept = np.ones(3), []
    message.encode({"deep": [lambda: array.sum()]}, OfArrays(), 0, kept)
    assert kept[0] is array


def test_a_dropped_variable_is_named():
    with dv.ParameterServerStrategy(num_workers=1) as strategy:
        objects = ServerObjects(1)
        for key in range(3000):
            objects.add(key, variable_of(strategy, 0.0, f"v{key}") if key % 1000 == 0 else _NAMED)
        for key in range(1, 3000):
            objects.drop(key)
        assert objects.variable(0).name == "v0"
        with pytest.raises(ContextError, match=r"variable 'v2000' is gone.*keep one"):
            objects.storage(2000)
        assert len(objects._names) < 1100


class _NAMED:
    name = "other"


def variable_of(strategy, value, name=None):
    with strategy.scope():
        return dv.Variable(value, name=name)


def test_the_optimizer_of_this_process_keeps_its_settings():
    def rate(step):
        return 0.5

    own, copied = _Optimizers(0), _Optimizers(1)
    sgd = dv.optimizers.SGD(rate)
    _, key, kind, settings = own.reference_of(sgd, lambda key: None)
    other = copied.resolve(key, kind, settings | {"_learning_rate": 0.25})
    assert other.learning_rate == 0.25
    assert own.resolve(key, kind, settings | {"_learning_rate": 0.25}) is sgd
    assert sgd._learning_rate is rate
    assert copied.resolve(key, kind, settings) is other
    assert other.learning_rate == 0.5


def test_a_fork_does_not_close_the_job():
    processes = object.__new__(JobProcesses)
    processes._pid = os.getpid() + 1
    processes.close()  # and touches nothing


class TestStepsTogether:
    """One that raises leaves no other carried out."""

    @pytest.fixture
    def strategy(self):
        with dv.ParameterServerStrategy(num_workers=1) as made:
            yield made

    @pytest.fixture
    def two(self, strategy):
        """Variables, of which the second has no learning rate any more."""
        a, b = (variable_of(strategy, np.zeros(2)) for _ in "ab")
        sgd = dv.optimizers.SGD(lambda step: 0.5 if step < 1 else -1.0)
        sgd.apply_gradients([(np.ones(2), b)])
        return sgd, a, b

    def test_of_several_variables(self, two):
        sgd, a, b = two
        with pytest.raises(ValueError, match="learning_rate"):
            sgd.apply_gradients([(np.ones(2), a), (np.ones(2), b)])
        assert not a.numpy().any()
        assert sgd.steps(b) == 1

    @pytest.mark.parametrize("twice", ["a", "b"])
    def test_of_a_call_whose_writes_count_once(self, strategy, two, twice):
        sgd, a, b = two
        other = a if twice == "a" else b

        def call():
            a.assign_add(np.ones(2))
            sgd.apply_gradients([(np.ones(2), a)])
            sgd.apply_gradients([(np.ones(2), other)])

        coordinator = dv.ClusterCoordinator(strategy)
        coordinator.schedule(call, once=True)
        with pytest.raises(ValueError, match="learning_rate"):
            coordinator.join()
        assert not a.numpy().any()

    def test_of_one_message(self, two):
        sgd, a, b = two
        steps = [functools.partial(sgd.step_at_server, each) for each in (a, b)]
        with pytest.raises(ValueError, match="learning_rate"):
            check_steps(steps)
        check_steps(steps[:1])
