"""Diagnostics of a step: its errors, and the calls and call sites that their texts name."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

from dvkernels import thread_frames, tracebacks, user_errors
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCalls

__all__: list[str] = []


class StepEnded(CollectiveMismatchError):
    """Refusal of a collective because the step has already failed, in this or another replica."""


_REBUILDABLE = (CollectiveMismatchError, CollectiveTimeoutError, StepEnded)


def echo_of(failure: BaseException | None) -> BaseException:
    """Return the error that a step's failure raises in the other replicas."""
    # A user's error class may not accept its own args, so only our classes are rebuilt.
    if failure is not None and type(failure) in _REBUILDABLE:
        echo: BaseException = type(failure)(*failure.args)
        return echo
    return StepEnded(
        f"this step has ended because a replica raised {user_errors.describe(failure)}"
    )


def combined_error(
    errors: Mapping[int, BaseException], num_replicas: int, first_replica: int
) -> BaseException:
    """Return the error of the lowest replica, with the errors of the others as notes."""
    first, *others = sorted(errors)
    error = errors[first]
    replicas_by_text: dict[str, list[int]] = {}
    for other in others:
        text = user_errors.describe(errors[other])
        replicas_by_text.setdefault(text, []).append(first_replica + other)
    for text, replicas in replicas_by_text.items():
        what = "it" if text == user_errors.describe(error) else text
        user_errors.annotate(error, f"{_numbered(replicas)} also raised {what}")
    if num_replicas > 1:
        user_errors.annotate(error, f"raised in replica {first_replica + first} of {num_replicas}")
    return error


def _numbered(replicas: Sequence[int]) -> str:
    """Return "replica 3" or "replicas 1, 2, 3"."""
    return f"replica{'s' * (len(replicas) > 1)} {', '.join(map(str, replicas))}"


def mismatch_error(
    calls: str, first: CollectiveCall, other: CollectiveCall
) -> CollectiveMismatchError:
    """Return the error of two replicas whose calls differ; ``calls`` describes those of all."""
    remedy = "every replica must call the same collectives in the same order, with "
    remedy += "the same shapes and dtypes"
    if str(other) == str(first):
        remedy = "they mean different objects that look alike; make them once, outside "
        remedy += "of run, or all replicas together in it"
    return CollectiveMismatchError(f"the replicas disagree: {calls}; {remedy}")


def desertion_error(calls: str) -> CollectiveMismatchError:
    """Return the error of replicas that wait for one that will not arrive."""
    return CollectiveMismatchError(
        f"a replica returned while others wait in a collective, or each waits for another: "
        f"{calls}; every replica must call the same collectives in "
        f"the same order"
    )


def timeout_error(replica: int, seconds: float, awaited: str) -> CollectiveTimeoutError:
    """Return the error of a replica that has waited in vain for ``awaited``."""
    return CollectiveTimeoutError(
        f"replica {replica} waited {seconds:g} s in vain for {awaited}; give the strategy "
        f"timeout_seconds, or set DVKERNELS_TIMEOUT_SECONDS, if they need longer"
    )


def missing_replicas(requests: Sequence[CollectiveCall | None], first_replica: int) -> list[int]:
    """Return the replicas that have made no call."""
    return [k for k, request in enumerate(requests, first_replica) if request is None]


def describe_issued(
    requests: Sequence[CollectiveCall], call_sites: Sequence[str], first_replica: int
) -> str:
    """Describe the calls of all replicas to an asynchronous collective."""
    return "; ".join(
        f"replica {replica} called {request} at {call_site}"
        for replica, (request, call_site) in enumerate(
            zip(requests, call_sites, strict=True), first_replica
        )
    )


def describe_replicas(
    requests: Sequence[CollectiveCall | None],
    pending_calls: PendingCalls | None,
    has_left: Sequence[bool],
    thread_idents: Mapping[int, int],
    first_replica: int,
) -> str:
    """Describe what each replica does, and where: it waits in a call, runs, or has returned."""
    frames = thread_frames.current_frames()
    return "; ".join(
        f"replica {first_replica + replica} "
        + (
            "has returned"
            if has_left[replica]
            else _describe_running(
                replica, request, pending_calls, frames.get(thread_idents.get(replica, 0))
            )
        )
        for replica, request in enumerate(requests)
    )


def _describe_running(
    replica: int,
    request: CollectiveCall | None,
    pending_calls: PendingCalls | None,
    frame: types.FrameType | None,
) -> str:
    call_site, doing = user_line(frame), "is still running"
    if request is not None:
        doing = f"called {request}"
    elif pending_calls is not None and (issued := pending_calls.issued_by(replica)) is not None:
        doing, call_site = f"called {issued.requests[replica]}", issued.call_sites[replica]
    return f"{doing} at {call_site}"


def user_line(frame: types.FrameType | None) -> str:
    """Return the file and line of the innermost frame outside of this package."""
    while frame is not None and frame.f_code.co_filename.startswith(tracebacks.PACKAGE):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
