"""Objects that are saved together and come back together."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvkernels import context
from dvkernels.checkpoint.format import step_names
from dvkernels.checkpoint.restoring import restore as restoring
from dvkernels.checkpoint.restoring.restore import Restored
from dvkernels.checkpoint.saving import save
from dvkernels.checkpoint.saving.background import SavesInBackground
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.errors import CheckpointError, ContextError

__all__ = ["Checkpoint"]


class Checkpoint(SavesInBackground):
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
        target = atomic_folder.located(path, "Checkpoint.save")
        self._saver.save(
            lambda: save.prepared(
                self.objects, None, metadata, target, lambda: atomic_folder.replaced(target)
            ),
            background=background,
        )

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
        they were. Only a disk that fails between the two leaves arrays half restored, and the
        error says which. An interrupt ends it before anything is changed, or waits for the end.

        Warns where a ``CheckpointManager`` has saved later steps beside it: ``manager.restore``
        goes back to go on from there.
        """
        check_context("Checkpoint.restore")
        where = atomic_folder.located(path, "Checkpoint.restore")
        self._saver.wait()
        restored = restoring.restore(self.objects, where, partial=partial)
        _warn_of_later_ones(where)
        return restored

    def __repr__(self) -> str:
        return f"Checkpoint({', '.join(self.objects)})"


def check_context(verb: str) -> None:
    frame = context.find()
    if frame is not None and frame.replica is not None:
        raise ContextError(
            f"{verb} in replica {frame.replica.replica_id_in_sync_group}: every replica "
            f"would do it; call it outside of run"
        )


def _warn_of_later_ones(path: Path) -> None:
    with contextlib.suppress(CheckpointError):  # their folder cannot be listed
        later = step_names.above(path)
        if later:
            warnings.warn(
                f"restored {path}; there are later checkpoints beside it, up to "
                f"{later[-1].name}, and a CheckpointManager saves nothing below them; to go back "
                f"and on from here, call manager.restore({step_names.step(path.resolve())})",
                RuntimeWarning,
                stacklevel=3,
            )
