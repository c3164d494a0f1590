"""Objects that are saved together and come back together."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvkernels import context
from dvkernels.checkpoint import folder, matching, reading, shards, snapshot, team, transfer
from dvkernels.checkpoint.matching import Plan, StateChange
from dvkernels.checkpoint.reading import Reader
from dvkernels.checkpoint.save import Save
from dvkernels.checkpoint.saving import Saves
from dvkernels.communicators.base import Workers
from dvkernels.errors import CheckpointError, ContextError
from dvkernels.profiler import tracing
from dvkernels.user_errors import text_of

__all__ = ["Checkpoint", "Restored"]


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


class Checkpoint(Saves):
    """Objects that are saved together and come back together.

    Parameters
    ----------
    **objects
        Variables; optimizers, with their slots; NumPy arrays; iterators of distributed datasets
        and anything else with ``state_dict`` and ``load_state_dict`` (of plain data and arrays);
        random generators of NumPy and of Python; plain data (None, bool, int, float, complex,
        str, bytes, NumPy scalars, and lists, tuples and dicts of them); and containers of all
        these: dicts, lists, tuples, named tuples, dataclasses registered with optree.

    Raises
    ------
    CheckpointError
        A name that begins with two underscores.

    Notes
    -----
    An ON_WRITE variable saves one copy, an ON_READ variable its aggregate, and NONE and ON_READ
    without aggregation every copy. One saved value reaches every copy, and is dealt out where the
    aggregation is SUM. Copies come back as they were on as many replicas, and on another number
    only if they were equal. So a checkpoint restores under another strategy, and on another number
    of replicas.

    ``objects`` is a dict and may be changed: ``checkpoint.objects["epoch"] = 3``.

    With variables of a strategy over several workers, every worker makes the same calls, on a
    folder that all of them see: each writes a part, and what one cannot do none has done. Data and
    arrays are the first worker's; random generators must be in the same state on all. Without such
    variables a checkpoint concerns its own process.

    The files are safetensors and JSON, without pickle: nothing that is loaded can run code.

    Examples
    --------
    >>> import tempfile, dvkernels as dv
    >>> weight = dv.Variable([1.0, 2.0])
    >>> progress = {"epoch": 3}
    >>> checkpoint = dv.Checkpoint(weight=weight, progress=progress)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(f"{folder}/run")
    ...     weight.assign([0.0, 0.0])
    ...     progress["epoch"] = 0
    ...     restored = checkpoint.restore(f"{folder}/run")
    >>> weight.numpy(), progress, restored.matched
    (array([1., 2.]), {'epoch': 3}, ('weight', 'progress'))
    """

    def __init__(self, **objects: Any) -> None:
        for name in objects:
            if name.startswith("__"):
                raise CheckpointError(f"Checkpoint: the name {name!r} is reserved; choose another")
        super().__init__()
        self.objects: dict[str, Any] = objects

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Save the objects as a folder; a checkpoint that is there already is replaced.

        Parameters
        ----------
        path : path-like
            The folder. Those above it are created.
        metadata : dict, optional
            Plain data of the user's own, which ``restore`` returns and ``show`` prints.
        background : bool
            Copy the objects to memory of our own, return, and write while the program goes on. An
            error is raised by the next ``save``, or by ``close``. The program's end waits. Over
            several workers the next ``save``, ``restore`` or ``close`` puts in place what all have
            written; until then the one before counts.

        Raises
        ------
        CheckpointError
            An object cannot be saved, a writer is at work there already, the disk is full or
            fails, or ``path`` holds something else; or another worker could not do its part, or has
            other objects. What was at ``path`` is there still, and nothing else is left behind.
        CollectiveTimeoutError, WorkerLostError
            A worker did not come, or is gone. What was at ``path`` is whole.
        ContextError
            Called in a replica: save outside of ``run``.

        Notes
        -----
        Written beside, synced and renamed: whenever the process is killed, a whole checkpoint is
        there, and ``restore`` finds it. Costs a pass over the arrays, without a second copy of
        them; in the background a copy, which is kept for the next time. Call it between steps:
        what another thread writes meanwhile may be saved half.
        """
        check_context("Checkpoint.save")
        target = Path(os.path.abspath(path))
        given = None if metadata is None else dict(metadata)
        self._saver.save(
            lambda: Save(
                snapshot.take(self.objects, None, given), target, lambda: folder.door(target)
            ),
            background=background,
        )

    @tracing.span("restore", "checkpoint")
    def restore(self, path: str | os.PathLike[str], *, partial: bool = False) -> Restored:
        """Restore the objects: all of them, or after an error none.

        Parameters
        ----------
        path : path-like
            What ``save`` was given.
        partial : bool
            Allow that some objects are not in the checkpoint, and that it holds more: what has the
            same path is restored, and the result says what has not.

        Returns
        -------
        Restored
            Numbers, strings and tuples come back in ``values``; a dict or list of them is
            changed in place.

        Raises
        ------
        CheckpointError
            An object and what was saved for it differ in kind, shape or dtype; copies that differ
            were saved, of another number of replicas; or not all paths match and ``partial`` is
            False.
        CheckpointDamagedError
            A file is missing, cut off or altered.
        ContextError
            Called in a replica: restore outside of ``run``.

        Notes
        -----
        Everything is read twice: once to compare the checksums, and when all fit, once to where it
        belongs. So there is no second copy in memory, and a damaged file leaves all objects as
        they were. Only a disk that fails between the two leaves variables half restored, and the
        error says which. An interrupt waits for the end.
        """
        check_context("Checkpoint.restore")
        self._saver.wait()
        shards.check_machine()
        where = Path(os.path.abspath(path))
        workers = team.of(self.objects)
        what = f"restore from {where}"
        with contextlib.ExitStack() as stack:
            readers: list[Reader] = []
            team.together(
                workers, what, lambda: readers.append(stack.enter_context(reading.opened(where)))
            )
            (reader,) = readers
            team.check_alike(workers, what, {folder.MANIFEST: reader.checksum})
            return self._restore(reader, partial, workers, what)

    def __repr__(self) -> str:
        return f"Checkpoint({', '.join(self.objects)})"

    def _restore(self, reader: Reader, partial: bool, workers: Workers, what: str) -> Restored:
        with team.telling(workers, what):  # optimizers make their slots, which all do together
            plan = matching.match(self.objects, reader.manifest)
            if not partial and (plan.missing or plan.unexpected):
                raise CheckpointError(
                    f"{reader.path}: expected what the objects are; it lacks "
                    f"{_listed(plan.missing)}, and holds {_listed(plan.unexpected)} besides; pass "
                    f"partial=True to restore what matches"
                )

        def check() -> None:
            reader.check(plan.loads)
            reader.load({name: [array] for name, array in plan.staged.items()})

        team.together(workers, what, check)
        fates = {"matched": plan.matched, "missing": plan.missing, "unexpected": plan.unexpected}
        team.check_alike(workers, what, {path: fate for fate in fates for path in fates[fate]})
        # In a thread, which no interrupt reaches: all of it is done, or none.
        transfer.in_parallel(lambda _: _commit(plan, reader, workers, what), [None], is_whole=True)
        values = {name: result() for name, result in plan.values.items()}
        self.objects.update(values)
        return Restored(
            reader.path,
            reader.manifest.step,
            values,
            reader.manifest.metadata,
            tuple(plan.matched),
            tuple(plan.missing),
            tuple(plan.unexpected),
        )


def _commit(plan: Plan, reader: Reader, workers: Workers, what: str) -> None:
    done: list[tuple[StateChange, Any]] = []
    try:
        team.together(workers, what, lambda: _set_states(plan.states, done))
    except BaseException:
        for change, before in done:
            change.set(before)
        raise
    try:
        team.together(workers, what, lambda: reader.load(plan.loads))
    except (OSError, CheckpointError) as error:
        error.add_note(
            "the file was whole a moment ago, when its checksums were compared: these objects now "
            f"hold parts of it, and must be restored again: {_listed(list(plan.loads))}"
        )
        raise
    for touch in plan.finish:
        touch()


def _set_states(changes: list[StateChange], done: list[tuple[StateChange, Any]]) -> None:
    """Set states, and note in ``done`` what was before; the one that is refused is noted too."""
    for change in changes:
        try:
            before = copy.deepcopy(change.get())
            done.append((change, before))
            change.set(change.new)
        except Exception as error:
            raise CheckpointError(
                f"{change.path}: the state that was saved cannot be taken over: {text_of(error)}"
            ) from error


def check_context(verb: str) -> None:
    frame = context.find()
    if frame is not None and frame.replica is not None:
        raise ContextError(
            f"{verb} in replica {frame.replica.replica_id_in_sync_group}: every replica "
            f"would do it; call it outside of run"
        )


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")
    return shown or "nothing"
