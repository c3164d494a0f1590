"""Steps that JAX compiles: ``strategy.jit``, and how ``strategy.run`` tells them from functions."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, final

from dvkernels import tracebacks
from dvkernels.context import Frame
from dvkernels.errors import ContextError
from dvkernels.replicas.runner import Runner
from dvkernels.replicas.streams import StreamedRunner
from dvkernels.user_errors import brief
from dvkernels.values import function_checks
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__ = ["CompiledStep"]

_MANY_TRACES = 10


class TraceCounter:
    """Counter of the traces of functions, by the place in the source where each is defined."""

    def __init__(self) -> None:
        self._counts: dict[Any, Iterator[int]] = {}

    def count(self, fn: Callable[..., Any]) -> None:
        """Count a trace; the tenth of one place warns."""
        place = getattr(fn, "__code__", None) or id(fn)
        count = next(self._counts.setdefault(place, itertools.count(1)))
        if count == _MANY_TRACES:
            warnings.warn(
                f"{brief(fn)} has been traced {count} times, and each time JAX compiles it anew: "
                f"make strategy.jit(fn) once, before the loop, and pass arrays of the same shapes "
                f"and dtypes (drop_remainder=True, or InputOptions(pad=True))",
                RuntimeWarning,
                stacklevel=_level_of_run(),
            )


def _level_of_run() -> int:
    """Return the ``stacklevel`` of the user's line that runs a step, for a frame of the trace."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not JitSteps._run_compiled.__code__:
        level, frame = level + 1, frame.f_back
    return level + 2  # its caller is ``strategy.run``


@final
class CompiledStep:
    """Step that JAX compiles for all replicas of a strategy: what ``strategy.jit`` returns.

    ``strategy.run(step, args)`` runs it. It is compiled at the first call, and anew for arguments
    of other structures, shapes or dtypes.

    Attributes
    ----------
    traces : int
        How often the function has been traced.
    """

    def __init__(
        self, fn: Callable[..., Any], strategy: Any, placement: Placement, counter: TraceCounter
    ) -> None:
        self.fn = fn
        self.traces = 0
        self._strategy = strategy
        self._placement = placement
        self._counter = counter
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: a step runs on all replicas together."""
        raise TypeError(
            f"{self!r} runs on all replicas together: call strategy.run(step, args=(...)), or "
            f"step.fn in a replica"
        )

    def __repr__(self) -> str:
        return f"<compiled step of {brief(self.fn)}, {self._placement.name}>"

    def count_trace(self) -> None:
        """Count a trace."""
        self.traces += 1
        self._counter.count(self.fn)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], placement: Placement) -> Any:
        """Run the step on all replicas, for ``strategy.run``, which holds the lock of its steps."""
        from dvkernels.strategies import spmd_program

        if placement is not self._placement:
            raise ContextError(
                f"run of {self!r} under {placement.name}: make one with its own strategy.jit(fn)"
            )
        return spmd_program.run(self, self._strategy, placement, self._programs, args, kwargs)


class JitSteps(ProcessBound):
    """Base class of strategies: their method that compiles a step."""

    _placement: Placement
    _runner: Runner | StreamedRunner
    _traces: TraceCounter

    def jit(self, fn: Callable[..., Any]) -> CompiledStep:
        """Return a step that JAX compiles into one program for all replicas, for :meth:`run`.

        Parameters
        ----------
        fn : callable
            Called once, with traced arrays, in a replica context whose collectives become those of
            XLA. Variables of all modes, optimizers, and ``ctx.rng_key`` work inside. ``fn`` itself
            can be run too, uncompiled, with the same results.

        Returns
        -------
        CompiledStep
            Make it once, before the loop: it holds the compiled programs.

        Raises
        ------
        ContextError
            The devices of the strategy are not those of JAX.
        TypeError
            ``fn`` is not callable, or is a coroutine or generator function.

        Notes
        -----
        Where it is run, arguments are traced if they are arrays or numbers, and constants of the
        program if not. The parts of a ``PerReplica`` must have one shape. No branch of Python can
        depend on a traced value; ``merge_call``, ``ctx.rng`` and new variables raise. What cannot
        be noticed: replicas that disagree within ``jax.lax.cond`` about a collective wait for each
        other in XLA forever; all weights 0 give NaN; updates of rows out of range are dropped.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.TPUStrategy(["jax:cpu:0"]) as strategy:
        ...     step = strategy.jit(lambda x: dv.get_replica_context().all_reduce("sum", 2 * x))
        ...     print(int(strategy.run(step, args=(21,))[0]))
        42
        """
        placement = self._placement
        if not placement.memory.is_immutable or placement.central_device is not None:
            raise ContextError(
                f"jit compiles steps for devices of JAX, and {placement.name} has others; use "
                f"dv.TPUStrategy, or run the function itself"
            )
        function_checks.check("jit", fn)
        return CompiledStep(fn, self, placement, self._traces)

    def _run_compiled(self, step: CompiledStep, frame: Frame | None, args: Any, kwargs: Any) -> Any:
        if frame is not None and frame.merging:
            raise ContextError(
                "run of a compiled step in merge_call: the step around it holds the devices; run "
                "it after that step"
            )
        if not isinstance(args, (list, tuple)) or not isinstance(kwargs or {}, Mapping):
            function_checks.check_arguments("run", args, kwargs)
        try:
            return self._runner.run_program(lambda: step.run(args, kwargs or {}, self._placement))
        except BaseException as error:
            tracebacks.trim(error)
            raise
