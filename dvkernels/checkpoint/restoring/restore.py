"""Execution of one restore by all workers: from the files of a checkpoint to the objects.

All work that may fail comes first and changes no object: the plan, the verification of all
checksums, and a backup of the state of the objects. Then a thread that no interrupt reaches
changes the objects, or after an error restores the backup.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvkernels import html_table, user_errors
from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.format import shards
from dvkernels.checkpoint.objects import ObjectTree
from dvkernels.checkpoint.restoring import restore_plan
from dvkernels.checkpoint.restoring.reader import CheckpointReader, open_reader
from dvkernels.checkpoint.restoring.restore_plan import Change, RestorePlan
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.communicators.base import Workers
from dvkernels.errors import CheckpointError
from dvkernels.profiler import tracing
from dvkernels.threads.shielded import uninterrupted

__all__ = ["Restored"]

_MAX_RETRIES = 10  # while a concurrent writer makes workers open different checkpoints
# Freed when memory runs out, so that a restore that has begun can be completed or undone.
_RESERVE_NBYTES = 4 << 20


@dataclass(frozen=True)
class Restored:
    """Result of a restore.

    Attributes
    ----------
    path : Path
        The checkpoint.
    step : int or None
        The step that it was saved under by a ``CheckpointManager``.
    values : dict
        The objects by name after the restore: variables, generators, lists, dicts and other
        mutable objects are the same objects as before; numbers, strings and tuples are new.
    metadata : dict
        The metadata that the user gave to ``save``.
    matched : tuple of str
        Paths of the restored objects: names of objects and keys of containers, joined by "/".
    missing : tuple of str
        Paths of objects that are not in the checkpoint; they are unchanged.
    unexpected : tuple of str
        Paths of saved objects that have no counterpart in the program.

    Examples
    --------
    >>> import tempfile
    >>> import dvkernels as dv
    >>> checkpoint = dv.Checkpoint(settings={"rate": 0.1})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(f"{folder}/saved")
    ...     restored = checkpoint.restore(f"{folder}/saved")
    >>> restored.values, restored.missing
    ({'settings': {'rate': 0.1}}, ())
    """

    path: Path
    step: int | None
    values: dict[str, Any] = field(repr=False)
    metadata: dict[str, Any]
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    _repr_html_ = html_table.of_attributes(
        path="path", step="step", metadata="metadata", matched="matched",
        missing="missing", unexpected="unexpected",
    )  # fmt: skip


@tracing.span("restore", "checkpoint")
def restore(tree: ObjectTree, path: Path, *, partial: bool) -> Restored:
    """Restore objects from a checkpoint: all of them, or after an error none."""
    shards.check_machine()
    what = f"restore from {path}"
    try:
        reader = _open_consistently(path, tree.workers, what)
        try:
            return _Restore(tree, reader, what).carry_out(partial)
        finally:
            reader.close()
    except MemoryError as error:
        raise CheckpointError(
            f"{what}: there is not enough memory; the objects are as they were"
        ) from error


def _open_consistently(path: Path, workers: Workers, what: str) -> CheckpointReader:
    """Open a checkpoint, the same one on all workers."""
    readers: list[CheckpointReader] = []

    def open_here() -> str:
        readers[:] = [uninterrupted(lambda: open_reader(path))]
        return readers[0].checksum

    for _ in range(_MAX_RETRIES):
        if len(set(all_or_none.run(workers, what, open_here))) == 1:
            return readers[0]
        readers[0].close()
    all_or_none.check_consistent(workers, what, {atomic_folder.MANIFEST: readers[0].checksum})
    raise AssertionError("unreachable")


class _Restore:
    def __init__(self, tree: ObjectTree, reader: CheckpointReader, what: str) -> None:
        self._tree = tree
        self._reader = reader
        self._workers = tree.workers
        self._what = what

    def carry_out(self, partial: bool) -> Restored:
        with all_or_none.announcing_failures(
            self._workers, self._what
        ):  # optimizers make their slots together
            plan = restore_plan.plan_restore(self._tree, self._reader.manifest)
            if not partial and (plan.missing or plan.unexpected):
                raise CheckpointError(
                    f"{self._reader.path}: expected the objects of this program; the checkpoint "
                    f"lacks {_listed(plan.missing)}, and also holds {_listed(plan.unexpected)}; "
                    f"pass partial=True to restore the objects that match"
                )
        backup: list[Any] = []
        all_or_none.run(
            self._workers, self._what, lambda: uninterrupted(lambda: self._prepare(plan, backup))
        )
        lists = {"matched": plan.matched, "missing": plan.missing, "unexpected": plan.unexpected}
        all_or_none.check_consistent(
            self._workers, self._what, {path: name for name in lists for path in lists[name]}
        )
        load = self._reader.prepare_load(plan.loads.targets)
        uninterrupted(lambda: self._commit(plan, backup, load), is_atomic=True)
        return Restored(
            self._reader.path,
            self._reader.manifest.step,
            plan.values,
            self._reader.manifest.metadata,
            tuple(plan.matched),
            tuple(plan.missing),
            tuple(plan.unexpected),
        )

    def _prepare(self, plan: RestorePlan, backup: list[Any]) -> None:
        """Verify all checksums, load the staged arrays, and back up the state of the objects."""
        self._reader.check(plan.loads.targets)
        self._reader.prepare_load({name: [each] for name, each in plan.loads.staged.items()})()
        backup += [
            _attempt(change.get, f"{change.path}: its state cannot be read")
            for change in plan.changes
        ]

    def _commit(self, plan: RestorePlan, backup: list[Any], load: Callable[[], None]) -> None:
        reserve = [bytearray(_RESERVE_NBYTES)]
        undo_calls: list[Callable[[], Any]] = []
        try:
            all_or_none.run(
                self._workers, self._what, lambda: _apply(plan.changes, backup, undo_calls)
            )
            all_or_none.run(self._workers, self._what, lambda: _load_arrays(plan, load, reserve))
            self._tree.objects.update(plan.values)
        except BaseException as error:
            reserve.clear()
            for undo in reversed(undo_calls):
                try:
                    undo()
                except BaseException as failure:
                    reason = user_errors.describe(failure)
                    user_errors.annotate(error, f"undoing the restore failed: {reason}")
            raise


def _apply(changes: list[Change], backup: list[Any], undo_calls: list[Callable[[], Any]]) -> None:
    """Apply changes; append a call that undoes each one before it is tried."""
    for change, previous in zip(changes, backup, strict=True):
        undo_calls.append(lambda change=change, previous=previous: change.set(previous))  # type: ignore[misc]
        _attempt(
            lambda change=change: change.set(change.new),  # type: ignore[misc]
            f"{change.path}: the saved state cannot be loaded",
        )


def _attempt(act: Callable[[], Any], failure: str) -> Any:
    try:
        return act()
    except Exception as error:
        raise CheckpointError(f"{failure}: {user_errors.describe(error)}") from error


def _load_arrays(plan: RestorePlan, load: Callable[[], None], reserve: list[bytearray]) -> None:
    """Read the arrays in place; after the verification only the disk or memory can fail."""
    try:
        try:
            _load_once(plan, load)
        except MemoryError:
            reserve.clear()
            _load_once(plan, load)
    except Exception as error:
        note = (
            "the file was whole when its checksums were compared; these objects now hold parts of "
            f"it and must be restored again: {_listed(list(plan.loads.targets))}"
        )
        if isinstance(error, MemoryError):
            raise CheckpointError(f"there is not enough memory; {note}") from error
        user_errors.annotate(error, note)
        raise


def _load_once(plan: RestorePlan, load: Callable[[], None]) -> None:
    load()
    for finish in plan.loads.finish:
        finish()


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")
    return shown or "nothing"
