"""Step report: what each replica of this process does at the moment, for ``ask``.

Everything is read off the stacks of the threads, so that steps record nothing.
"""

from __future__ import annotations

import os
import time
from types import CodeType, FrameType
from typing import Any

from dvkernels import thread_frames, tracebacks
from dvkernels.profiler import ask_server
from dvkernels.replicas import diagnostics
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.task_farm import TaskFarm

__all__: list[str] = []

# Code at the bottom of the stack of each replica in a step, and of the caller of the step; filled
# by the module that has them.
REPLICAS: set[CodeType] = set()
RUNS: set[CodeType] = set()
_MAPS = {TaskFarm.serve.__code__, TaskFarm.help_out.__code__}
_KEEP_WAITING = Rendezvous._keep_waiting.__code__
_BETWEEN_WORKERS = f"{tracebacks.PACKAGE}communicators{os.sep}workers{os.sep}"


def report() -> list[dict[str, Any]]:
    """Return the running replicas: where each is, what it waits for, and since when.

    ``state`` is ``"runs"``, ``"waits"`` (for ``replicas``), ``"performs"`` (a collective for all)
    or ``"waits for workers"``; ``seconds`` is how long it has waited, None for less than a second.
    """
    stacks = {
        ident: thread_frames.stack_of(frame)
        for ident, frame in thread_frames.current_frames().items()
    }
    names = dict(
        found for stack in stacks.values() for frame in stack
        for found in _name_of_step(frame)
    )  # fmt: skip
    return [
        _replica(ident, stack, frame, names)
        for ident, stack in stacks.items()
        for frame in stack
        if frame.f_code in REPLICAS or frame.f_code in _MAPS
    ]


def _name_of_step(frame: FrameType) -> list[tuple[int, tuple[str, int]]]:
    if frame.f_code not in RUNS:
        return []
    found = thread_frames.locals_of(frame)
    step, owner = found.get("rendezvous"), found.get("self")
    if step is None or owner is None:
        return []
    return [(id(step), (owner.label, int(found.get("number", 0))))]


def _replica(
    ident: int, stack: list[FrameType], entrance: FrameType, names: dict[int, tuple[str, int]]
) -> dict[str, Any]:
    found = thread_frames.locals_of(entrance)
    rank = int(found.get("rank", 0))
    about: dict[str, Any] = {"thread": ident, "at": diagnostics.user_line(stack[0])}
    if entrance.f_code in _MAPS:
        farm: TaskFarm = found["self"]
        about |= {"strategy": farm.name, "replica": farm.first_replica + rank}
        return {**about, "item": farm.calls[rank], "state": "runs"}
    step: Rendezvous = found["rendezvous"]
    strategy, number = names.get(id(step), ("", 0))
    about |= {"strategy": strategy, "step": number, "replica": step.global_rank(rank)}
    above = stack[: stack.index(entrance)]
    is_between = any(each.f_code.co_filename.startswith(_BETWEEN_WORKERS) for each in above)
    waited = next((each for each in above if each.f_code is _KEEP_WAITING), None)
    seconds = None
    if waited is not None:
        seconds = time.monotonic() - thread_frames.locals_of(waited).get("began", time.monotonic())
    call, missing = step.waits_of(rank)
    if is_between:
        return {**about, "state": "waits for workers", "call": call}
    if not call:
        return {**about, "state": "runs"}
    state = "waits" if missing or waited is not None else "performs"
    return {**about, "state": state, "call": call, "replicas": missing, "seconds": seconds}


ask_server.register_section("replicas", report)
