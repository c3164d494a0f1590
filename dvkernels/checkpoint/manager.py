"""Manager of a directory of checkpoints, one per step: retention, and restoring the latest."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvkernels import html_table
from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.checkpoint import Checkpoint, check_context
from dvkernels.checkpoint.format import step_names
from dvkernels.checkpoint.objects import ObjectTree
from dvkernels.checkpoint.restoring import restore
from dvkernels.checkpoint.restoring.restore import Restored
from dvkernels.checkpoint.saving import save
from dvkernels.checkpoint.saving.background import SavesInBackground
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.checkpoint.storage.file_system import Folder
from dvkernels.checkpoint.storage.folder_lock import FolderLock
from dvkernels.errors import CheckpointDamagedError, CheckpointError
from dvkernels.profiler import tracing
from dvkernels.profiler.debugging import LOGGER
from dvkernels.user_errors import brief

__all__ = ["CheckpointManager"]


class CheckpointManager(SavesInBackground):
    """Manager of the checkpoints of a run in one directory: ``step-00000100`` and so on.

    Parameters
    ----------
    checkpoint : Checkpoint
        The objects to save and restore.
    directory : path-like
        Created by the first save.
    max_to_keep : int or None
        A save removes all but the newest ``max_to_keep`` checkpoints; None keeps all.
    keep_every : int, optional
        Steps that this number divides are never removed, and not counted.

    Raises
    ------
    CheckpointError
        Not a :class:`Checkpoint`, or numbers below 1.

    Notes
    -----
    The newest checkpoint is the one with the highest step, and no lower step is saved. To go back
    to a step and continue from there, call :meth:`restore`.

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
                f"CheckpointManager: expected a dv.Checkpoint; got {brief(checkpoint)}"
            )
        for name, number in (("max_to_keep", max_to_keep), ("keep_every", keep_every)):
            if number is not None and (type(number) is not int or number < 1):
                raise CheckpointError(
                    f"CheckpointManager: expected {name} to be a whole number above 0, or None; "
                    f"got {brief(number)}"
                )
        super().__init__()
        self._checkpoint = checkpoint
        self._directory = atomic_folder.absolute_path(directory, "CheckpointManager")
        self._max_to_keep = max_to_keep
        self._keep_every = keep_every
        # From a restore of an older step to the next save: the names of the later checkpoints.
        self._superseded: frozenset[str] = frozenset()

    @property
    def directory(self) -> Path:
        """Directory of the checkpoints."""
        return self._directory

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Existing checkpoints in the order of their steps; their files are not checked."""
        return step_names.within(self._directory)

    @property
    def latest_checkpoint(self) -> Path | None:
        """Newest checkpoint, or None; its files are not checked."""
        return max(self.checkpoints, key=step_names.step, default=None)

    def save(
        self, step: int, *, metadata: Mapping[str, Any] | None = None, background: bool = False
    ) -> Path:
        """Save the objects as the checkpoint of a step, and remove old checkpoints.

        Parameters
        ----------
        step : int
            At least 0, and not below the newest existing step, unless :meth:`restore` has gone
            back. An existing checkpoint of this step is replaced.
        metadata, background
            As in :meth:`Checkpoint.save`.

        Returns
        -------
        Path
            Path of the checkpoint, which a background save creates later.

        Raises
        ------
        CheckpointError, ContextError
            As in :meth:`Checkpoint.save`. Nothing has been removed.
        """
        check_context("CheckpointManager.save")
        path = self._directory / step_names.name(_checked(step, "save"))

        transaction = functools.partial(self._transaction, path)
        with tracing.span("save", "checkpoint"):
            self._saver.wait()
            prepared = save.prepare(self._checkpoint.objects, step, metadata, path, transaction)
            if prepared.workers.size == 1:  # of several workers the chief checks, in Save.begin
                self._superseded_by(path)
            self._saver.save(prepared, background=background)
        return path

    def restore(self, step: int, *, partial: bool = False) -> Restored:
        """Go back to a step and continue from there: the next save removes all later steps.

        Parameters
        ----------
        step : int
            Step of an existing checkpoint.
        partial : bool
            As in :meth:`Checkpoint.restore`.

        Raises
        ------
        CheckpointError, CheckpointDamagedError, ContextError
            As in :meth:`Checkpoint.restore`; or the step does not exist.

        Notes
        -----
        Until the next save completes, all checkpoints exist and the newest one is the same as
        before. That save adds its own and removes those that were later at the time of the
        restore, in one atomic step.
        """
        check_context("CheckpointManager.restore")
        name = step_names.name(_checked(step, "restore"))
        tree = self._opened_tree()
        names = self._names(tree, f"restore step {step} of {self._directory}")
        if name not in names:
            there = ", ".join(names) or "no checkpoint"
            raise CheckpointError(f"{self._directory}: expected {name}; there is {there}")
        return self._restore(tree, names, name, partial)

    def restore_latest(self, *, partial: bool = False) -> Restored | None:
        """Restore the newest checkpoint that is not damaged; return None if none exists.

        Parameters
        ----------
        partial : bool
            As in :meth:`Checkpoint.restore`.

        Raises
        ------
        CheckpointError
            The checkpoint does not match the objects; nothing has changed.
        CheckpointDamagedError
            All existing checkpoints are damaged.

        Notes
        -----
        Damaged checkpoints that were skipped are named in a warning and to the logger; the next
        save removes them.
        """
        check_context("CheckpointManager.restore_latest")
        tree = self._opened_tree()
        faults: dict[str, str] = {}
        while True:
            # Listed again each time: a concurrent run may save and remove checkpoints.
            names = self._names(tree, f"restore the latest of {self._directory}")
            faults = {name: faults[name] for name in names if name in faults}
            candidates = [name for name in names if name not in faults]
            if not candidates:
                break
            newest = candidates[-1]
            try:
                restored = self._restore(tree, names, newest, partial)
            except CheckpointDamagedError as error:
                faults[newest] = str(error)
                continue
            skipped = _listed({name: faults[name] for name in faults if name > newest})
            if skipped:
                message = f"restored {restored.path}, because newer ones are damaged: {skipped}"
                LOGGER.warning("%s", message)
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return restored
        if faults:
            raise CheckpointDamagedError(
                f"{self._directory}: every checkpoint there is damaged: {_listed(faults)}"
            )
        return None

    def __repr__(self) -> str:
        return f"CheckpointManager({str(self._directory)!r}, max_to_keep={self._max_to_keep})"

    _repr_html_ = html_table.of_attributes(directory="_directory", max_to_keep="_max_to_keep")

    def _opened_tree(self) -> ObjectTree:
        """Open the tree of the objects, after waiting for saves in the background."""
        self._saver.wait()
        self._checkpoint.close()
        return ObjectTree(self._checkpoint.objects)

    def _names(self, tree: ObjectTree, what: str) -> list[str]:
        """List the checkpoints as the chief sees them: a network file system may lag on others."""
        names, *_ = all_or_none.run(
            tree.workers, what, lambda: [each.name for each in self.checkpoints]
        )
        return list(names)

    def _restore(self, tree: ObjectTree, names: list[str], name: str, partial: bool) -> Restored:
        restored = restore.restore(tree, self._directory / name, partial=partial)
        self._superseded = frozenset(names[names.index(name) + 1 :])
        return restored

    @contextlib.contextmanager
    def _transaction(self, path: Path) -> Iterator[None]:
        """Lock the directory, replace ``path`` atomically, and remove old checkpoints."""
        atomic_folder.make_folders(self._directory)
        with (
            atomic_folder.opened(self._directory) as parent,
            FolderLock(parent / ".lock", f"save to {path}"),
        ):
            atomic_folder.remove_leftovers(parent, step_names.NAME)
            superseded = [parent / name for name in self._superseded_by(path)]
            with atomic_folder.replacement(parent / path.name, superseded):
                yield
            self._superseded = frozenset()
            self._remove_old(parent, path)

    def _superseded_by(self, path: Path) -> list[str]:
        """Return the names that a save to ``path`` supersedes; raise if other steps are later."""
        existing = self.checkpoints
        later = [other.name for other in existing if step_names.step(other) > step_names.step(path)]
        unknown = [name for name in later if name not in self._superseded]
        if unknown:
            raise CheckpointError(
                f"save to {path}: expected a step that is not below the newest, {unknown[-1]}; to "
                f"go back to a step and continue from there, call manager.restore(step) first: the "
                f"save after it removes the later steps; or use another directory"
            )
        names = [other.name for other in existing if other != path]
        return [name for name in names if name in self._superseded]

    def _remove_old(self, parent: Folder, just_saved: Path) -> None:
        with self._logging_failures("superseded checkpoints"):
            atomic_folder.remove_superseded(parent, step_names.NAME)
        old: list[Path] = []
        with self._logging_failures("old checkpoints"):
            old = self._old(just_saved)
        for path in old:
            with self._logging_failures(path.name):
                atomic_folder.discard(parent / path.name)

    def _old(self, just_saved: Path) -> list[Path]:
        every = self._keep_every
        if self._max_to_keep is None:
            return []
        counted = [
            path for path in self.checkpoints if every is None or step_names.step(path) % every
        ]
        return [path for path in counted[: -self._max_to_keep] if path != just_saved]

    @contextlib.contextmanager
    def _logging_failures(self, what: str) -> Iterator[None]:
        """Log an error of removing something: the save has succeeded, and the next one retries."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            LOGGER.warning("%s could not be removed from %s: %s", what, self._directory, error)


def _checked(step: Any, verb: str) -> int:
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(
            f"CheckpointManager.{verb}: expected a step, a whole number from 0; got {brief(step)}"
        )
    return step


def _listed(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in reversed([*faults.items()]))
