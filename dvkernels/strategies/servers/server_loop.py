"""Server loop: answers the requests of all processes for its rows, one at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dvkernels import pickling
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.errors import WorkerLostError
from dvkernels.optimizers.optimizer import check_steps
from dvkernels.strategies.servers import message
from dvkernels.strategies.servers.job_objects import ServerObjects
from dvkernels.user_errors import describe
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.request_counts import RequestTotals
from dvkernels.variables.variable import new_variable

__all__: list[str] = []

CREATE, SLOTTED, REPORT = "create", "slotted", "report"  # instead of a function


class ServerReport(NamedTuple):
    """What a server has done for the variables that exist."""

    totals: RequestTotals
    busy_seconds: float
    most_waiting: int  # processes, at one time


class CoordinatorHasLeft(Exception):
    """The job is over."""


def check_coordinator(channel: MessageChannel) -> None:
    """Raise if the coordinator has left, or is lost."""
    why, is_in_order = channel.why_gone()
    if is_in_order:
        raise CoordinatorHasLeft(why)
    if why:
        raise WorkerLostError(f"the coordinator is lost, and with it the job: {why}")


def serve(rank: int, channels: Sequence[MessageChannel], placement: Placement) -> None:
    """Answer requests until the coordinator, the first of the channels, leaves."""
    objects = ServerObjects(rank)

    def answer_all() -> bool:
        num_answered, has_moved = 0, False
        for channel in channels:
            seen = channel.num_moved
            channel.flush()
            asked = channel.receive()
            has_moved = has_moved or asked is not None or channel.num_moved != seen
            if asked is not None:
                began = time.perf_counter()
                channel.post(_answer(objects, placement, channel.peer, asked))
                objects.busy_seconds += time.perf_counter() - began
                num_answered += 1
        if num_answered > objects.most_waiting:
            objects.most_waiting = num_answered
        return has_moved

    def check(_: float) -> None:
        check_coordinator(channels[0])

    try:
        while True:
            wait.until(answer_all, channels[0].pace, math.inf, check)
    except CoordinatorHasLeft:
        return


def _answer(
    objects: ServerObjects, placement: Placement, peer: int, asked: Any
) -> list[memoryview]:
    """Carry out the requests of a message, in order, up to the first that fails."""
    number, error = pickling.number_of(asked), None
    results: list[Any] = []
    try:
        dropped, listed, author = message.decode(asked, objects)
        for key in dropped:
            objects.drop(key)
        if len(listed) > 1:
            check_steps(request for _, request, *_ in listed)
        for what, request, key, *arguments in listed:
            if request == CREATE:
                _create(objects, placement, key, *arguments)
                results.append(None)
            elif request == SLOTTED:
                results.append(objects.slotted(key))
            elif request == REPORT:
                totals = objects.totals()
                results.append(ServerReport(totals, objects.busy_seconds, objects.most_waiting))
            else:
                storage = objects.storage(key)
                if not storage.is_slot:
                    objects.counts[key].note(author or peer, what, storage, tuple(arguments))
                results.append(request(storage, *arguments))
    except Exception as raised:
        error = pickling.sendable(raised)
    try:
        return message.encode((error, results), objects, number)
    except Exception as raised:  # a result that cannot be sent
        text = f"a server raised {describe(raised)}"
        return message.encode((RuntimeError(text), []), objects, number)


def _create(objects: ServerObjects, placement: Placement, key: int, name: str, rows: Any) -> None:
    when, how = VariableSynchronization.ON_WRITE, VariableAggregation.NONE
    objects.add(key, new_variable(Copies([rows], placement, name, when, how), True))
