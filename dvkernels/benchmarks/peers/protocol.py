"""What a worker and the benchmark say to each other: one JSON object a line.

    benchmark                                     worker
                                                  {"version": "...", "variants": ["in place"]}
    {"do": "prepare", "count": 1024, ...}         {"wrong": {"in place": 0}}
    {"do": "run", "variant": ..., "calls": 10}    {"seconds": 0.001}
    {"do": "check"}                               {"wrong": {"in place": 0}}
    {"do": "end"}                                 ends, as it does when its input is closed

Between two commands a worker sleeps: it must not take a core from what is measured meanwhile. What
a library prints goes to standard error, so that nothing comes between the lines.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.inputs import Piece

__all__: list[str] = []

Message = dict[str, Any]


class AllReduce(Protocol):
    """An all-reduce by sum as one process of a peer sees it."""

    variants: tuple[str, ...]

    def prepare(self, count: int, dtype: np.dtype[Any], seed: int) -> None:
        """Hold buffers of this size, and drop earlier ones."""

    def call_once(self, variant: str) -> list[np.ndarray[Any, Any]]:
        """Reduce the random inputs of the seed; return the results that this process has."""

    def seconds(self, variant: str, num_calls: int) -> float:
        """Time so many calls, begun by all ranks together."""


class Team(Protocol):
    """The other processes of a peer."""

    def spread(self, message: Message) -> None:
        """Hand a command to every other process."""

    def collect(self, answer: Message) -> list[Message]:
        """Return the answers of all processes."""


class Alone:
    """The team of a peer that is one process."""

    def spread(self, message: Message) -> None:
        """Do nothing."""

    def collect(self, answer: Message) -> list[Message]:
        """Return the one answer."""
        return [answer]


class Line:
    """The way to the benchmark: standard input, and what was standard output."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, message: Message) -> None:
        """Send one line."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def hear(self) -> Message:
        """Wait for one line; the end of the input is the command to end."""
        text = sys.stdin.readline()
        message: Message = json.loads(text) if text.strip() else {"do": "end"}
        return message


class Actor:
    """Does what a message says, with one process's share of a peer."""

    def __init__(self, all_reduce: AllReduce, num_replicas: int) -> None:
        self._all_reduce = all_reduce
        self._num_replicas = num_replicas
        self._count, self._seed = 0, 0

    def act(self, message: Message) -> Message:
        """Carry out one command. One that takes too long ends the process, with its stacks."""
        faulthandler.dump_traceback_later(message.get("deadline", 600), exit=True)
        try:
            if message["do"] == "run":
                seconds = self._all_reduce.seconds(message["variant"], message["calls"])
                return {"seconds": seconds}
            if message["do"] == "prepare":
                self._count, self._seed = message["count"], message["seed"]
                self._all_reduce.prepare(self._count, np.dtype(message["dtype"]), self._seed)
            return {"wrong": {name: self._num_wrong(name) for name in self._all_reduce.variants}}
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _num_wrong(self, variant: str) -> int:
        results = self._all_reduce.call_once(variant)
        pieces = [Piece(k, 0, None, 0, self._count) for k in range(len(results))]
        return inputs.num_wrong(results, pieces, "sum", self._seed, self._num_replicas, self._count)


def serve(line: Line, actor: Actor, team: Team, ready: Message) -> None:
    """Answer commands until the benchmark says it is over."""
    line.say(ready)
    while True:
        message = line.hear()
        team.spread(message)
        if message["do"] == "end":
            return
        line.say(_joined(team.collect(actor.act(message))))


def _joined(answers: list[Message]) -> Message:
    """Return the answer of all: the slowest time, the sum of the errors."""
    if "seconds" in answers[0]:
        return {"seconds": max(answer["seconds"] for answer in answers)}
    names = answers[0]["wrong"]
    return {"wrong": {name: sum(answer["wrong"][name] for answer in answers) for name in names}}


def repeat(call: Callable[[], object], num_calls: int, clock: Callable[[], float]) -> float:
    """Return the seconds of so many calls."""
    began = clock()
    for _ in range(num_calls):
        call()
    return clock() - began
