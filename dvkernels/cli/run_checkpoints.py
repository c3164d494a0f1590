"""Checkpoints of a run: restored at its start, saved on the way, at its end, and at a signal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

import dvkernels as dv
from dvkernels.cli.progress_bars import say
from dvkernels.cli.training_config import CheckpointConfig
from dvkernels.cli.training_loop import Training

__all__: list[str] = []

# Exit statuses of a shell for these signals; the others ask for a restart by a status of their own.
_EXIT_CODES = {"SIGINT": 130, "SIGHUP": 129}
_SIGNALS = ("SIGTERM", "SIGUSR1", *_EXIT_CODES)


class NoCheckpoints:
    """The checkpoints of a run that saves none: each method does nothing."""

    resumed_at_step: int | None = None
    is_requested = False

    def after_step(self) -> None:
        """Save nothing."""

    def finish(self) -> None:
        """Save nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RunCheckpoints:
    """The checkpoints of a run, a context manager in the main thread.

    A signal ends the step that it finds, and no other: the step is saved once, however many
    signals come, and ``after_step`` raises ``SystemExit``. Ignored signals stay ignored, so that
    ``nohup`` holds.
    """

    def __init__(self, training: Training, config: CheckpointConfig) -> None:
        self._training = training
        self._config = config
        checkpoint = dv.Checkpoint(
            weights=training.weights,
            optimizer=training.optimizer,
            batches=training.batches,
            progress=training.progress,
        )
        self._manager = dv.CheckpointManager(checkpoint, config.directory)
        self._preemption = dv.PreemptionHandler(
            self._manager,
            signals=[name for name in _SIGNALS if _is_heard(name)],
            exit_code=config.exit_code,
            agree=_any_of(training.strategy),
        )
        self._stack = contextlib.ExitStack()
        restored = self._manager.restore_latest()
        self.resumed_at_step = None if restored is None else restored.step

    @property
    def is_requested(self) -> bool:
        """Whether a signal asks this process to save and end."""
        return self._preemption.is_requested

    def after_step(self) -> None:
        """Save the step if it is due; after a signal save it and raise ``SystemExit``.

        Nothing is saved of a diverged run, so its last checkpoint is from before.
        """
        if self._training.has_diverged:
            return
        steps = self._training.steps
        self._end_if_requested(steps)
        if steps % self._config.every == 0:
            self._manager.save(steps, background=True)

    def finish(self) -> None:
        """Save the last step."""
        steps = self._training.steps
        if (self.resumed_at_step or 0) < steps and not self._training.has_diverged:
            self._end_if_requested(steps)
            self._manager.save(steps)
            self._say_what_was_saved(steps)

    def _end_if_requested(self, steps: int) -> None:
        try:
            self._preemption.after_step(steps)
        except SystemExit as end:
            name = self._preemption.received
            self._say_what_was_saved(steps, f" after {name}" if name else "")
            raise SystemExit(_EXIT_CODES.get(name or "", end.code)) from None

    def _say_what_was_saved(self, steps: int, reason: str = "") -> None:
        resolver = self._training.strategy.cluster_resolver
        if resolver is None or resolver.is_chief:
            say(
                f"saved step {steps} of {self._training.num_steps}{reason} in "
                f"{self._manager.latest_checkpoint}; --resume goes on from there"
            )

    def __enter__(self) -> Self:
        self._stack.enter_context(self._manager)
        self._stack.enter_context(self._preemption)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _is_heard(name: str) -> bool:
    number = getattr(signal, name, None)
    return number is not None and signal.getsignal(number) is not signal.SIG_IGN


def _any_of(strategy: dv.Strategy) -> Callable[[bool], bool]:
    """Return a collective "or" over all workers, for requests to stop."""

    def agree(is_requested: bool) -> bool:
        if len(strategy.worker_devices) == strategy.num_replicas_in_sync:
            return is_requested  # a single worker
        requested = strategy.distribute_values_from_function(lambda _: np.int8(is_requested))
        return bool(strategy.reduce("max", requested))

    return agree
