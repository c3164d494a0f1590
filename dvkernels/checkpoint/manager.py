"""A folder of checkpoints, one a step: which to keep, and which to go on from."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels.checkpoint import folder, snapshot, team
from dvkernels.checkpoint.checkpoint import Checkpoint, Restored, check_context
from dvkernels.checkpoint.lock import Lock
from dvkernels.checkpoint.save import Save
from dvkernels.checkpoint.saving import Saves
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.profiler.debugging import LOGGER
from dvkernels.user_errors import shown

__all__ = ["CheckpointManager"]

_NAME = re.compile(r"step-([0-9]{8,18})")


class CheckpointManager(Saves):
    """Keeps the checkpoints of a run in one folder: ``step-00000100`` and so on.

    Parameters
    ----------
    checkpoint : Checkpoint
    directory : path-like
        Created by the first save.
    max_to_keep : int or None
        After a save, all but the newest so many are removed; None keeps all.
    keep_every : int, optional
        Steps that this divides are kept for good, and not counted.

    Raises
    ------
    CheckpointError
        Not a :class:`Checkpoint`, or numbers below 1.

    Notes
    -----
    The newest is the one with the highest step. To go back on purpose and go on from there, use
    another directory, or remove the later ones.

    Examples
    --------
    >>> import tempfile, dvkernels as dv
    >>> weight = dv.Variable(0.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manager = dv.CheckpointManager(dv.Checkpoint(weight=weight), folder, max_to_keep=2)
    ...     for step in range(1, 5):
    ...         weight.assign_add(1.0)
    ...         _ = manager.save(step)
    ...     weight.assign(0.0)
    ...     restored = manager.restore_latest()
    ...     [path.name for path in manager.checkpoints]
    ['step-00000003', 'step-00000004']
    >>> restored.step, float(weight)
    (4, 4.0)
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | None = 5,
        *,
        keep_every: int | None = None,
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise CheckpointError(
                f"CheckpointManager: expected a dv.Checkpoint; got {shown(checkpoint)}"
            )
        for name, number in (("max_to_keep", max_to_keep), ("keep_every", keep_every)):
            if number is not None and (type(number) is not int or number < 1):
                raise CheckpointError(
                    f"CheckpointManager: expected {name} to be a whole number above 0, or None; "
                    f"got {number!r}"
                )
        super().__init__()
        self._checkpoint = checkpoint
        self._directory = Path(os.path.abspath(directory))
        self._max_to_keep = max_to_keep
        self._keep_every = keep_every

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._directory

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints that are there, in the order of their steps; not looked into."""
        return checkpoints_in(self._directory)

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint, None if there is none; not looked into."""
        return max(self.checkpoints, key=_step, default=None)

    def save(
        self, step: int, *, metadata: Mapping[str, Any] | None = None, background: bool = False
    ) -> Path:
        """Save the objects under a step, and remove what is not to be kept.

        Parameters
        ----------
        step : int
            At least 0. A checkpoint of this step that is there already is replaced.
        metadata, background
            As in :meth:`Checkpoint.save`.

        Returns
        -------
        Path
            Where it is, or will be.

        Raises
        ------
        CheckpointError, ContextError
            As in :meth:`Checkpoint.save`. Nothing has been removed.
        """
        check_context("CheckpointManager.save")
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(
                f"CheckpointManager.save: expected a step, a whole number from 0; got {shown(step)}"
            )
        given = None if metadata is None else dict(metadata)
        path = self._directory / _name(step)
        self._saver.save(
            lambda: Save(
                snapshot.take(self._checkpoint.objects, step, given), path, lambda: self._door(path)
            ),
            background=background,
        )
        return path

    def restore_latest(self, *, partial: bool = False) -> Restored | None:
        """Restore the newest checkpoint that is whole; None if there is none at all.

        Parameters
        ----------
        partial : bool
            As in :meth:`Checkpoint.restore`.

        Raises
        ------
        CheckpointError
            It does not fit the objects; nothing has changed.
        CheckpointDamagedError
            There are checkpoints, and all of them are damaged.

        Notes
        -----
        Says in a warning, and to the logger, which checkpoints are damaged and were passed over.
        """
        self._saver.wait()
        workers = team.of(self._checkpoint.objects)
        # Those that the chief sees: a folder between hosts need not look the same to all at once.
        names, *_ = team.together(
            workers,
            f"restore the latest of {self._directory}",
            lambda: [path.name for path in self.checkpoints],
        )
        faults: list[str] = []
        for path in (self._directory / name for name in reversed(names)):
            try:
                restored = self._checkpoint.restore(path, partial=partial)
            except CheckpointDamagedError as error:
                faults.append(f"{path.name}: {error}")
                continue
            if faults:
                message = f"restored {path}, because newer ones are damaged: {'; '.join(faults)}"
                LOGGER.warning("%s", message)
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return restored
        if faults:
            raise CheckpointDamagedError(
                f"{self._directory}: every checkpoint there is damaged: {'; '.join(faults)}"
            )
        return None

    def __repr__(self) -> str:
        return f"CheckpointManager({str(self._directory)!r}, max_to_keep={self._max_to_keep})"

    @contextlib.contextmanager
    def _door(self, path: Path) -> Iterator[None]:
        """Be the only one who writes to the directory; remove what is not to be kept."""
        folder.make_folders(self._directory)
        with Lock(self._directory / ".lock", f"save to {path}"):
            folder.clean(self._directory, _NAME)
            yield
            self._remove_old(_step(path))

    def _remove_old(self, just_saved: int) -> None:
        if self._max_to_keep is None:
            return
        every = self._keep_every
        try:
            counted = [path for path in self.checkpoints if every is None or _step(path) % every]
            for path in counted[: -self._max_to_keep]:
                if _step(path) != just_saved:
                    folder.discard(path)
        except (
            OSError,
            CheckpointError,
        ) as error:  # the save itself has succeeded; the next one tries again
            LOGGER.warning("old checkpoints could not be removed: %s", error)


def checkpoints_in(directory: Path) -> tuple[Path, ...]:
    """Return the checkpoints that managers have saved in a folder, in the order of their steps."""
    try:
        return tuple(sorted(folder.within(directory, _NAME), key=_step))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error}") from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
