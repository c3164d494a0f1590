"""Worker loop: runs the calls that the coordinator sends, one after another."""

from __future__ import annotations

import contextvars
import math
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from dvkernels import context, pickling, tracebacks, user_errors
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.context import Frame
from dvkernels.devices.array_spec import HostArray
from dvkernels.strategies.current_call import current_call
from dvkernels.strategies.servers import message
from dvkernels.strategies.servers.message import References
from dvkernels.strategies.servers.server_loop import CoordinatorHasLeft, check_coordinator
from dvkernels.variables.table_server import pending_writes

__all__: list[str] = []

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for a call that runs when the coordinator goes


def work(rank: int, coordinator: MessageChannel, frame: Frame, references: References) -> None:
    """Run calls until the coordinator leaves."""
    has_ended = threading.Event()
    threading.Thread(
        target=_watch, args=(coordinator, has_ended), name="dvkernels-watch", daemon=True
    ).start()
    came: HostArray | None = None

    def has_moved() -> bool:
        nonlocal came
        seen = coordinator.num_moved
        coordinator.flush()
        came = coordinator.receive()
        return came is not None or coordinator.num_moved != seen

    def check(_: float) -> None:
        check_coordinator(coordinator)

    try:
        while True:
            wait.until(has_moved, coordinator.pace, math.inf, check)
            if came is not None:
                coordinator.post(_reply(rank, frame, references, came))
    except CoordinatorHasLeft:
        return
    finally:
        has_ended.set()


def _reply(rank: int, frame: Frame, references: References, came: HostArray) -> list[memoryview]:
    """Return the reply to a call: ``(error, result, writes that count once)``."""
    result, error = None, None
    writes: Sequence[Any] = []
    try:
        call = message.decode(came, references)
        result, writes = contextvars.copy_context().run(_call, rank, frame, *call)
    except BaseException as raised:  # SystemExit, too, is the call's
        tracebacks.trim(raised)
        lines = traceback.format_exception(type(raised), raised, raised.__traceback__)
        text = "".join(lines).rstrip()
        user_errors.annotate(raised, f"in process {os.getpid()}:\n{text}")
        error = pickling.sendable(raised)
    try:
        reply = message.encode((error, result, writes), references, pickling.number_of(came))
        return message.owned(reply)
    except Exception as raised:
        what = "result" if error is None else f"error, {user_errors.describe(error)},"
        refused = TypeError(f"the {what} of a call cannot be sent: {user_errors.describe(raised)}")
        return message.encode((refused, None, []), references, pickling.number_of(came))


def _call(
    rank: int, frame: Frame, number: int, is_once: bool, fn: Any, args: Any, kwargs: Any
) -> tuple[Any, Sequence[Any]]:
    context.enter(frame)
    current_call.set((rank - 1, number))
    if not is_once:
        return fn(*args, **kwargs), []
    pending: list[Any] = []
    pending_writes.set(pending)
    result = fn(*args, **kwargs)
    asked: list[Any] = []
    for server, what, request, _copies, *arrays in pending:
        asked += server.divided(what, request, tuple(arrays))[0]
    return result, asked


def _watch(coordinator: MessageChannel, has_ended: threading.Event) -> None:
    """End this process, if the coordinator is gone and a call that runs does not end."""
    while not has_ended.wait(_LOOK_SECONDS):
        why, is_in_order = coordinator.why_gone()
        if why and not has_ended.wait(_GRACE_SECONDS):
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(0 if is_in_order else 1)
