"""One restore on its way: from the files of a folder to the objects, by all workers together.

Everything that may fail comes first and touches nothing: the files are read and compared with
their checksums, what the objects have now is asked for, and the plan is made. Then a thread that no
interrupt reaches changes all of them, or gives back what it has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvkernels import user_errors
from dvkernels.checkpoint import all_or_none
from dvkernels.checkpoint.format import shards
from dvkernels.checkpoint.restoring import reader as reading
from dvkernels.checkpoint.restoring import restore_plan
from dvkernels.checkpoint.restoring.reader import CheckpointReader
from dvkernels.checkpoint.restoring.restore_plan import Change, RestorePlan
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.communicators.base import Workers
from dvkernels.errors import CheckpointError
from dvkernels.profiler import tracing
from dvkernels.threads.shielded import uninterrupted

__all__ = ["Restored"]

_MOST_TRIES = 10  # of workers that have opened different checkpoints, beside somebody who writes
# Let go of when there is no more memory, so that what has begun comes to an end.
_RESERVE_NBYTES = 4 << 20


@dataclass(frozen=True)
class Restored:
    """What a restore has done.

    Attributes
    ----------
    path : Path
        The checkpoint.
    step : int or None
        The step that it was saved under by a ``CheckpointManager``.
    values : dict
        The objects by name after the restore: variables, generators, lists, dicts and other
        objects that can be changed are the same ones; numbers, strings, tuples are new.
    metadata : dict
        What the user gave to ``save``.
    matched : tuple of str
        The paths of what was restored: names of objects and keys of containers, joined by "/".
    missing : tuple of str
        The paths of what the checkpoint does not hold; left as they were.
    unexpected : tuple of str
        The paths of what the checkpoint holds and nobody asked for.
    """

    path: Path
    step: int | None
    values: dict[str, Any] = field(repr=False)
    metadata: dict[str, Any]
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@tracing.span("restore", "checkpoint")
def restore(objects: dict[str, Any], path: Path, *, partial: bool) -> Restored:
    """Restore objects from a checkpoint: all of them, or after an error none."""
    shards.check_machine()
    workers = all_or_none.of(objects)
    what = f"restore from {path}"
    try:
        reader = _opened_alike(path, workers, what)
        try:
            return _Restore(objects, reader, workers, what).carry_out(partial)
        finally:
            reader.close()
    except MemoryError as error:
        raise CheckpointError(
            f"{what}: there is not enough memory; the objects are as they were"
        ) from error


def _opened_alike(path: Path, workers: Workers, what: str) -> CheckpointReader:
    """Open a checkpoint, the same on all workers."""
    for is_last in (*[False] * _MOST_TRIES, True):
        readers: list[CheckpointReader] = []
        all_or_none.together(
            workers,
            what,
            lambda into=readers: into.append(uninterrupted(lambda: reading.open_reader(path))),  # type: ignore[misc]
        )
        (reader,) = readers
        with all_or_none.telling(workers, what):
            is_alike = len(set(workers.exchange(reader.checksum))) == 1
        if is_last and not is_alike:
            all_or_none.check_alike(workers, what, {atomic_folder.MANIFEST: reader.checksum})
        if is_alike:
            return reader
        reader.close()
    raise AssertionError("unreachable")


class _Restore:
    def __init__(
        self, objects: dict[str, Any], reader: CheckpointReader, workers: Workers, what: str
    ) -> None:
        self._objects = objects
        self._reader = reader
        self._workers = workers
        self._what = what

    def carry_out(self, partial: bool) -> Restored:
        with all_or_none.telling(self._workers, self._what):  # optimizers make their slots together
            plan = restore_plan.match(self._objects, self._reader.manifest)
            if not partial and (plan.missing or plan.unexpected):
                raise CheckpointError(
                    f"{self._reader.path}: expected what the objects are; it lacks "
                    f"{_listed(plan.missing)}, and holds {_listed(plan.unexpected)} besides; pass "
                    f"partial=True to restore what matches"
                )
        before: list[Any] = []
        all_or_none.together(
            self._workers, self._what, lambda: uninterrupted(lambda: self._prepare(plan, before))
        )
        fates = {"matched": plan.matched, "missing": plan.missing, "unexpected": plan.unexpected}
        all_or_none.check_alike(
            self._workers, self._what, {path: fate for fate in fates for path in fates[fate]}
        )
        load = self._reader.loading(plan.loads)
        uninterrupted(lambda: self._commit(plan, before, load), is_atomic=True)
        return Restored(
            self._reader.path,
            self._reader.manifest.step,
            plan.values,
            self._reader.manifest.metadata,
            tuple(plan.matched),
            tuple(plan.missing),
            tuple(plan.unexpected),
        )

    def _prepare(self, plan: RestorePlan, before: list[Any]) -> None:
        """Read everything once, and ask for what the objects have now."""
        self._reader.check(plan.loads)
        self._reader.load({name: [array] for name, array in plan.staged.items()})
        before += [_tried(change.get, f"{change.path}: its state") for change in plan.changes]

    def _commit(self, plan: RestorePlan, before: list[Any], load: Callable[[], None]) -> None:
        reserve = [bytearray(_RESERVE_NBYTES)]
        done: list[Callable[[], Any]] = []  # how to undo it
        try:
            all_or_none.together(
                self._workers, self._what, lambda: _make(plan.changes, before, done)
            )
            all_or_none.together(self._workers, self._what, lambda: _fill(plan, load, reserve))
            self._objects.update(plan.values)
        except BaseException as error:
            reserve.clear()
            for undo in reversed(done):
                try:
                    undo()
                except BaseException as failure:
                    words = user_errors.in_words(failure)
                    user_errors.annotate(error, f"what had been restored was not undone: {words}")
            raise


def _make(changes: list[Change], before: list[Any], done: list[Callable[[], Any]]) -> None:
    """Make changes, and note in ``done`` how to undo them; also the one that fails half-way."""
    for change, had in zip(changes, before, strict=True):
        done.append(lambda change=change, had=had: change.set(had))  # type: ignore[misc]
        _tried(
            lambda change=change: change.set(change.new),  # type: ignore[misc]
            f"{change.path}: the state that was saved",
        )


def _tried(act: Callable[[], Any], what: str) -> Any:
    try:
        return act()
    except Exception as error:
        raise CheckpointError(
            f"{what} cannot be taken over: {user_errors.in_words(error)}"
        ) from error


def _fill(plan: RestorePlan, load: Callable[[], None], reserve: list[bytearray]) -> None:
    """Read what belongs into arrays: the second time, so that only a disk can fail."""
    try:
        try:
            _fill_once(plan, load)
        except MemoryError:
            reserve.clear()
            _fill_once(plan, load)
    except Exception as error:
        note = (
            "the file was whole a moment ago, when its checksums were compared: these objects now "
            f"hold parts of it, and must be restored again: {_listed(list(plan.loads))}"
        )
        if isinstance(error, MemoryError):
            raise CheckpointError(f"there is not enough memory; {note}") from error
        user_errors.annotate(error, note)
        raise


def _fill_once(plan: RestorePlan, load: Callable[[], None]) -> None:
    load()
    for touch in plan.finish:
        touch()


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")
    return shown or "nothing"
