"""A folder of checkpoints, one a step: which to keep, and which to go on from."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.checkpoint import Checkpoint, check_context
from dvkernels.checkpoint.format import step_names
from dvkernels.checkpoint.restoring import restore as restoring
from dvkernels.checkpoint.restoring.restore import Restored
from dvkernels.checkpoint.saving.background import SavesInBackground
from dvkernels.checkpoint.saving.save import Save, prepared
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.checkpoint.storage.files import Folder
from dvkernels.checkpoint.storage.folder_lock import FolderLock
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.profiler.debugging import LOGGER
from dvkernels.user_errors import shown

__all__ = ["CheckpointManager"]


class CheckpointManager(SavesInBackground):
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
    The newest is the one with the highest step, and nothing is saved below it. To go back and go on
    from there, call :meth:`restore` with a step.

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
                    f"got {shown(number)}"
                )
        super().__init__()
        self._checkpoint = checkpoint
        self._directory = atomic_folder.located(directory, "CheckpointManager")
        self._max_to_keep = max_to_keep
        self._keep_every = keep_every
        # Since the run went back: what was later then, until the next save.
        self._ending: frozenset[str] = frozenset()

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._directory

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints that are there, in the order of their steps; not looked into."""
        return step_names.within(self._directory)

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint, None if there is none; not looked into."""
        return max(self.checkpoints, key=step_names.step, default=None)

    def save(
        self, step: int, *, metadata: Mapping[str, Any] | None = None, background: bool = False
    ) -> Path:
        """Save the objects under a step, and remove what is not to be kept.

        Parameters
        ----------
        step : int
            At least 0, and not below the newest that is there, unless :meth:`restore` has gone
            back. A checkpoint of this step is replaced.
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
        path = self._directory / step_names.name(_checked(step, "save"))

        def prepare() -> Save:
            taken = prepared(
                self._checkpoint.objects, step, metadata, path, lambda: self._door(path)
            )
            if taken.workers.size == 1:  # of several the chief looks, when they begin
                self._ending_with(path)
            return taken

        self._saver.save(prepare, background=background)
        return path

    def restore(self, step: int, *, partial: bool = False) -> Restored:
        """Go back to a step, to go on from there: the next save removes what is later.

        Parameters
        ----------
        step : int
            One that is there.
        partial : bool
            As in :meth:`Checkpoint.restore`.

        Raises
        ------
        CheckpointError, CheckpointDamagedError, ContextError
            As in :meth:`Checkpoint.restore`; or the step is not there.

        Notes
        -----
        Until the next save is whole everything is there still, and the newest is the one that it
        was. With it, at the same moment, all later ones are gone that were there at the restore.
        """
        check_context("CheckpointManager.restore")
        name = step_names.name(_checked(step, "restore"))
        self._wait()
        names = self._names(f"restore step {step} of {self._directory}")
        if name not in names:
            there = ", ".join(names) or "no checkpoint"
            raise CheckpointError(f"{self._directory}: expected {name}; there is {there}")
        return self._restore(names, name, partial)

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
        Says in a warning, and to the logger, which checkpoints are damaged and were passed over;
        the next save removes them.
        """
        check_context("CheckpointManager.restore_latest")
        self._wait()
        faults: dict[str, str] = {}
        while True:
            # Each time anew: a run beside this one may save, and remove.
            names = self._names(f"restore the latest of {self._directory}")
            faults = {name: faults[name] for name in names if name in faults}
            left = [name for name in names if name not in faults]
            if not left:
                break
            try:
                restored = self._restore(names, left[-1], partial)
            except CheckpointDamagedError as error:
                faults[left[-1]] = str(error)
                continue
            passed_over = _told({name: faults[name] for name in faults if name > left[-1]})
            if passed_over:
                message = f"restored {restored.path}, because newer ones are damaged: {passed_over}"
                LOGGER.warning("%s", message)
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return restored
        if faults:
            raise CheckpointDamagedError(
                f"{self._directory}: every checkpoint there is damaged: {_told(faults)}"
            )
        return None

    def __repr__(self) -> str:
        return f"CheckpointManager({str(self._directory)!r}, max_to_keep={self._max_to_keep})"

    def _wait(self) -> None:
        self._saver.wait()
        self._checkpoint.close()

    def _names(self, what: str) -> list[str]:
        """Return what the chief sees: a folder need not look the same on all hosts at once."""
        names, *_ = all_or_none.together(
            all_or_none.of(self._checkpoint.objects),
            what,
            lambda: [each.name for each in self.checkpoints],
        )
        return list(names)

    def _restore(self, names: list[str], name: str, partial: bool) -> Restored:
        restored = restoring.restore(
            self._checkpoint.objects, self._directory / name, partial=partial
        )
        self._ending = frozenset(names[names.index(name) + 1 :])
        return restored

    @contextlib.contextmanager
    def _door(self, path: Path) -> Iterator[None]:
        """Be the only one who writes to the directory; remove what is not to be kept."""
        atomic_folder.make_folders(self._directory)
        with (
            atomic_folder.opened(self._directory) as parent,
            FolderLock(parent / ".lock", f"save to {path}"),
        ):
            atomic_folder.clean(parent, step_names.NAME)
            ending = [parent / name for name in self._ending_with(path)]
            with atomic_folder.written(parent / path.name, ending):
                yield
            self._ending = frozenset()
            self._remove_old(parent, path)

    def _ending_with(self, path: Path) -> list[str]:
        """Return what a save ends, the later ones of the time before the run went back."""
        there = self.checkpoints
        later = [other.name for other in there if step_names.step(other) > step_names.step(path)]
        unknown = [name for name in later if name not in self._ending]
        if unknown:
            raise CheckpointError(
                f"save to {path}: expected a step that is not below the newest, {unknown[-1]}; to "
                f"go back and on from a step, call manager.restore(step) first: the save after it "
                f"removes what is later; or use another directory"
            )
        return [other.name for other in there if other.name in self._ending and other != path]

    def _remove_old(self, parent: Folder, just_saved: Path) -> None:
        settle = functools.partial(atomic_folder.settle, parent, step_names.NAME)
        self._try_to_remove("what the run has gone back from", settle)
        old: list[Path] = []
        self._try_to_remove("old checkpoints", lambda: old.extend(self._old(just_saved)))
        for path in old:
            self._try_to_remove(
                path.name, functools.partial(atomic_folder.discard, parent / path.name)
            )

    def _old(self, just_saved: Path) -> list[Path]:
        every = self._keep_every
        if self._max_to_keep is None:
            return []
        counted = [
            path for path in self.checkpoints if every is None or step_names.step(path) % every
        ]
        return [path for path in counted[: -self._max_to_keep] if path != just_saved]

    def _try_to_remove(self, what: str, remove: Callable[[], None]) -> None:
        """Remove something; if it fails the save itself has succeeded, and the next tries again."""
        try:
            remove()
        except (OSError, CheckpointError) as error:
            LOGGER.warning("%s could not be removed from %s: %s", what, self._directory, error)


def _checked(step: Any, verb: str) -> int:
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(
            f"CheckpointManager.{verb}: expected a step, a whole number from 0; got {shown(step)}"
        )
    return step


def _told(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in reversed([*faults.items()]))
