"""Progress bars on standard error, drawn at most ten times a second."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dvkernels.cli.step_times import clock
from dvkernels.cli.training_loop import Training

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__: list[str] = []

_SECONDS_BETWEEN_DRAWINGS = 0.1


class ProgressBars:
    """A bar for each training, with loss and examples per second; without trainings nothing.

    A context manager, which draws the last state at its end. A terminal that is gone is no error.
    """

    def __init__(self, trainings: Mapping[str, Training]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        # In a notebook's kernel rich would need ipywidgets; a stream shows the last state.
        console = Console(stderr=True, force_jupyter=False)
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._trainings: dict[TaskID, Training] = {
            self._progress.add_task(title, total=training.num_steps, pace=""): training
            for title, training in trainings.items()
        }
        self._drawn_at = -math.inf

    def draw(self) -> None:
        """Draw all bars, unless that was done less than a tenth of a second ago."""
        now = clock()
        if self._trainings and now - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn_at = now
            self._draw()

    def _draw(self) -> None:
        for task, training in self._trainings.items():
            pace = f"loss {training.loss:.4f}  {training.times.examples_per_second:,.0f} examples/s"
            self._progress.update(task, completed=training.steps, pace=pace)
        with unless_hung_up():
            self._progress.refresh()

    def __enter__(self) -> Self:
        if self._trainings:
            with unless_hung_up():
                self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._trainings:
            self._draw()
            with unless_hung_up():
                self._progress.stop()


@contextlib.contextmanager
def unless_hung_up() -> Iterator[None]:
    """Write to standard error; where its terminal is gone, this and later output is dropped."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def say(text: str) -> None:
    """Print a line on standard error."""
    with unless_hung_up():
        print(text, file=sys.stderr, flush=True)
