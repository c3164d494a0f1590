"""Public class for a set of objects that are saved and restored together."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvkernels import context, html_table
from dvkernels.checkpoint.format import step_names
from dvkernels.checkpoint.objects import ObjectTree
from dvkernels.checkpoint.restoring import restore
from dvkernels.checkpoint.restoring.restore import Restored
from dvkernels.checkpoint.saving import save
from dvkernels.checkpoint.saving.background import SavesInBackground
from dvkernels.checkpoint.storage import atomic_folder
from dvkernels.errors import CheckpointError, ContextError
from dvkernels.profiler import tracing

__all__ = ["Checkpoint"]


class Checkpoint(SavesInBackground):
    """Set of named objects that are saved together and restored together.

    Parameters
    ----------
    **objects
        Variables; optimizers, with their slots; NumPy arrays; iterators of distributed datasets,
        strategies (seed and step count, on which ``ctx.rng`` depends) and any other object whose
        ``state_dict`` and ``load_state_dict`` use plain data and arrays; random generators of NumPy
        and of Python; plain data (None, bool, int, float, complex, str, bytes, NumPy scalars, and
        lists, tuples and dicts of them); and containers of all these: dicts, lists, tuples, named
        tuples, dataclasses registered with optree.

    Raises
    ------
    CheckpointError
        A name that begins with two underscores.

    Notes
    -----
    An ON_WRITE variable saves one copy, an ON_READ variable its aggregate, and NONE and ON_READ
    without aggregation every copy. A single saved value is restored to every copy, or shared out
    over the copies where the aggregation is SUM. Several saved copies are restored one to one on
    as many replicas, and on another number only if they are equal. So a checkpoint can be restored
    under another strategy and on another number of replicas.

    ``objects`` is a dict and may be changed: ``checkpoint.objects["epoch"] = 3``.

    With a strategy over several workers, or its variables, every worker makes the same calls, on a
    folder that all workers see. Each worker writes a part, and a call succeeds on all workers or
    on none. Data and arrays are the first worker's; random generators must be in the same state on
    all workers. Without such variables a checkpoint belongs to its own process.

    The files are safetensors and JSON, without pickle: loading them cannot run code.

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
        """Save the objects as a folder, replacing an existing checkpoint.

        Parameters
        ----------
        path : path-like
            The folder. Missing parent folders are created.
        metadata : dict, optional
            Plain data of the user, which ``restore`` returns and ``show`` prints.
        background : bool
            Copy the objects, return, and write the copy while the program continues. An error is
            raised by the next ``save`` or by ``close``. The end of the program waits for the save.
            Over several workers the next ``save``, ``restore`` or ``close`` completes the save;
            until then the previous checkpoint is the valid one.

        Raises
        ------
        CheckpointError
            An object cannot be saved, another writer is saving there, the disk is full or fails,
            or ``path`` is not a checkpoint; or another worker failed or has other objects. The
            previous checkpoint at ``path`` is unchanged, and nothing else is left behind.
        CollectiveTimeoutError, WorkerLostError
            A worker did not take part in time, or is lost. The previous checkpoint is whole.
        ContextError
            Called in a replica: save outside of ``run``.

        Notes
        -----
        The files are written to a staging folder, synced, and renamed: whenever the process is
        killed, a whole checkpoint exists, and ``restore`` finds it. The cost is one pass over the
        arrays, without a second copy of them; in the background also a copy, whose memory is kept
        for the next save. Call it between steps: a save does not lock out writes of other threads.
        """
        check_context("Checkpoint.save")
        target = atomic_folder.absolute_path(path, "Checkpoint.save")
        transaction = functools.partial(atomic_folder.locked_replacement, target)
        with tracing.span("save", "checkpoint"):
            self._saver.wait()
            prepared = save.prepare(self.objects, None, metadata, target, transaction)
            self._saver.save(prepared, background=background)

    def restore(self, path: str | os.PathLike[str], *, partial: bool = False) -> Restored:
        """Restore the objects: all of them, or after an error none.

        Parameters
        ----------
        path : path-like
            The path that was given to ``save``.
        partial : bool
            Allow objects that are missing from the checkpoint, and others that are only there:
            objects with the same path are restored, and the result lists the rest.

        Returns
        -------
        Restored
            Numbers, strings and tuples are returned in ``values``; a dict or list of them is
            changed in place.

        Raises
        ------
        CheckpointError
            An object and its saved state differ in kind, shape or dtype; a variable was saved as
            copies that differ, on another number of replicas; or not all paths match and
            ``partial`` is False.
        CheckpointDamagedError
            A file is missing, truncated or altered.
        ContextError
            Called in a replica: restore outside of ``run``.

        Notes
        -----
        The files are read twice: first to verify all checksums, then into the objects. So there is
        no second copy in memory, and a damaged file leaves all objects as they were. Only a disk
        that fails at the second reading leaves arrays partly restored; the error names them. An
        interrupt ends the restore before any object is changed, or waits for its end.

        Warns where a ``CheckpointManager`` has saved later steps beside this checkpoint: use
        ``manager.restore`` to go back to a step and continue from there.
        """
        check_context("Checkpoint.restore")
        source = atomic_folder.absolute_path(path, "Checkpoint.restore")
        self._saver.wait()
        restored = restore.restore(ObjectTree(self.objects), source, partial=partial)
        _warn_of_later_steps(source)
        return restored

    def __repr__(self) -> str:
        return f"Checkpoint({', '.join(self.objects)})"

    _repr_html_ = html_table.of_attributes(
        objects=lambda self: {name: type(each).__name__ for name, each in self.objects.items()}
    )


def check_context(verb: str) -> None:
    """Raise in replica context."""
    frame = context.find()
    if frame is not None and frame.replica is not None:
        raise ContextError(
            f"{verb} in replica {frame.replica.replica_id_in_sync_group}: every replica "
            f"would do it; call it outside of run"
        )


def _warn_of_later_steps(path: Path) -> None:
    with contextlib.suppress(CheckpointError):  # the directory cannot be listed
        later = step_names.later_than(path)
        if later:
            warnings.warn(
                f"restored {path}; there are later checkpoints beside it, up to "
                f"{later[-1].name}, and a CheckpointManager saves nothing below them; to continue "
                f"from here, call manager.restore({step_names.step(path.resolve())})",
                RuntimeWarning,
                stacklevel=3,
            )
