"""Observed calls of collectives: with the hooks of the profiler around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from dvkernels.profiler import collective_hooks, tracing
from dvkernels.profiler.collective_hooks import CollectiveEvent, Observer
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCall
from dvkernels.replicas.step_state import StepState

__all__: list[str] = []


def meet(
    step: StepState, replica: int, request: CollectiveCall, perform: Callable[..., Any]
) -> Any:
    """Return the result of ``perform`` for a replica's call, between the hooks."""
    observers = collective_hooks.active or ()
    event = CollectiveEvent(request, step, replica)
    for observer in observers:
        if observer.before is not None:
            _call_before(step, replica, request, event, observers)
            break
    try:
        result = perform(step, replica, request, True)
    except BaseException as error:
        _abort(event, error, observers)
        raise
    _finish(step, replica, event, observers)
    return result


def await_pending(
    step: StepState, replica: int, event: CollectiveEvent, wait: Callable[[], Any]
) -> Any:
    """Return the result of a call that has been issued, and call the hooks of its end."""
    observers = collective_hooks.active or ()
    recording = tracing.active
    began = 0 if recording is None else recording.begin("wait")
    try:
        result = wait()
    except BaseException as error:
        _abort(event, error, observers)
        raise
    finally:
        if recording is not None:
            recording.end("wait", "collective", began, event)
    _finish(step, replica, event, observers)
    return result


def issue(
    step: StepState, replica: int, request: CollectiveCall, perform: Callable[..., PendingCall]
) -> PendingCall:
    """Return the pending call that ``perform`` issues, after the hooks ``before``."""
    observers = collective_hooks.active or ()
    event = CollectiveEvent(request, step, replica)
    _call_before(step, replica, request, event, observers)
    try:
        return perform(step, replica, request, event)
    except BaseException as error:
        _abort(event, error, observers)
        raise


def _call_before(
    step: StepState,
    replica: int,
    request: CollectiveCall,
    event: CollectiveEvent,
    observers: Sequence[Observer],
) -> None:
    """Call the hooks ``before``.

    An error of a hook ends the step in all replicas, whatever this one does with it.
    """
    event.contributed = request.payload
    try:
        for observer in observers:
            before = observer.before
            if before is not None:  # a call of a function that does nothing takes 0.1 us
                before(event)
    except BaseException as error:
        event.contributed = None
        step.fail(error, replica)
        _abort(event, error, observers)
        raise
    event.contributed = None


def _finish(
    step: StepState, replica: int, event: CollectiveEvent, observers: Sequence[Observer]
) -> None:
    event.ended = perf_counter_ns()
    try:
        for observer in observers:
            observer.after(event)
    except BaseException as error:
        step.fail(error, replica)
        raise


def _abort(event: CollectiveEvent, error: BaseException, observers: Sequence[Observer]) -> None:
    """Call the hooks ``abort`` with an error."""
    event.ended, event.error = perf_counter_ns(), error
    try:
        for observer in observers:
            observer.abort(event)
    finally:
        event.error = None  # the trace keeps the event, and should not keep the error's frames


def perform(
    step: StepState, first: CollectiveCall, payloads: list[Any], in_background: bool
) -> Sequence[Any]:
    """Carry out a collective for all replicas, as a span of the trace, if there is one.

    On the thread of a replica the span lies inside that of the replica's call, which describes it.
    """
    recording, arrange = tracing.active, step.perform
    began = 0 if recording is None else recording.begin("reduce")
    try:
        return first.act(payloads) if arrange is None else arrange(first.act, payloads)
    finally:
        if recording is not None:
            event = CollectiveEvent(first, step, 0) if in_background else None
            recording.end("reduce", "collective", began, event)
