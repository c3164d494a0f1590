"""Error classes of the library: one common base class, each also derived from a builtin error.

A message says what was expected, what was received, from which replica, and what to do.
"""

from __future__ import annotations

from dvkernels import tracebacks

__all__ = [
    "PREEMPTED",
    "AlgorithmError",
    "BufferMismatchError",
    "CallCancelledError",
    "CheckpointDamagedError",
    "CheckpointError",
    "ClusterError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "ContextError",
    "DatasetError",
    "DeviceError",
    "DriftError",
    "DvKernelsError",
    "LaunchError",
    "NonFiniteError",
    "NotABufferError",
    "ReduceOpError",
    "SynchronizationError",
    "TraceError",
    "UnsupportedDTypeError",
    "WorkerLostError",
]

#: Exit status of a process that was preempted and has saved: ``sys.exit(dv.errors.PREEMPTED)``.
PREEMPTED = 42


class DvKernelsError(Exception):
    """Base class of every error that the library raises itself.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> try:
    ...     dv.kernels.all_reduce([np.zeros(3), np.zeros(4)])
    ... except dv.errors.DvKernelsError as error:
    ...     print(type(error).__name__, isinstance(error, ValueError))
    BufferMismatchError True
    """

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython prints, without the frames of this package."""
        return tracebacks.rendered(self)


class BufferMismatchError(DvKernelsError, ValueError):
    """Buffers differ in shape, dtype or device kind, overlap, or cannot be written.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.all_reduce([np.zeros(3), np.zeros(4)])
    Traceback (most recent call last):
        ...
    dvkernels.errors.BufferMismatchError: all_reduce needs one ...
    """


class NotABufferError(DvKernelsError, TypeError):
    """Something that is not an array was passed as a buffer.

    Examples
    --------
    >>> from dvkernels import kernels
    >>> kernels.all_reduce(["a", "b"])
    Traceback (most recent call last):
        ...
    dvkernels.errors.NotABufferError: all_reduce needs arrays: replica 0 is a str; ...
    """


class UnsupportedDTypeError(DvKernelsError, TypeError):
    """The reduction is not defined for this dtype (MEAN of integers, SUM of bool, object).

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.all_reduce([np.array([1]), np.array([2])], "mean")
    Traceback (most recent call last):
        ...
    dvkernels.errors.UnsupportedDTypeError: all_reduce: MEAN is not defined for int64: ...
    """


class DeviceError(DvKernelsError, RuntimeError):
    """A device does not exist, or cannot be used here.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.MirroredStrategy([])
    Traceback (most recent call last):
        ...
    dvkernels.errors.DeviceError: expected at least one device, got an empty list; ...
    """


class ReduceOpError(DvKernelsError, ValueError):
    """There is no reduction of that name.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.reduce([np.zeros(2)], "median")
    Traceback (most recent call last):
        ...
    dvkernels.errors.ReduceOpError: expected a ReduceOp or one of the names ...; got 'median'
    """


class AlgorithmError(DvKernelsError, ValueError):
    """There is no algorithm of that name, or it does not support the devices or workers.

    Examples
    --------
    >>> import numpy as np
    >>> from dvkernels import kernels
    >>> kernels.all_reduce([np.zeros(2)], algorithm="tree")
    Traceback (most recent call last):
        ...
    dvkernels.errors.AlgorithmError: all_reduce: expected an algorithm of ...; got 'tree'
    """


class ClusterError(DvKernelsError, ValueError):
    """The description of the cluster is missing, malformed or contradictory.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.partitioners.FixedShards(0)
    Traceback (most recent call last):
        ...
    dvkernels.errors.ClusterError: ...
    """


class LaunchError(DvKernelsError, RuntimeError):
    """The workers of a job cannot be started as requested.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.launch("program.py")
    Traceback (most recent call last):
        ...
    dvkernels.errors.LaunchError: launch: expected a function; got 'program.py'
    """


class CollectiveMismatchError(DvKernelsError, RuntimeError):
    """The replicas called different collectives, or one of them did not take part.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> def step():
    ...     rank = dv.get_replica_context().replica_id_in_sync_group
    ...     dv.get_replica_context().all_reduce("sum", np.ones(1 + rank))
    >>> dv.MirroredStrategy(2).run(step)
    Traceback (most recent call last):
        ...
    dvkernels.errors.CollectiveMismatchError: the replicas disagree: ...
    """


class CollectiveTimeoutError(DvKernelsError, TimeoutError):
    """A replica or worker did not arrive at a collective before the deadline.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import time
    >>> def step():
    ...     time.sleep(0.2 * dv.get_replica_context().replica_id_in_sync_group)
    ...     dv.get_replica_context().all_reduce("sum", 1.0)
    >>> dv.MirroredStrategy(2, timeout_seconds=0.01).run(step)
    Traceback (most recent call last):
        ...
    dvkernels.errors.CollectiveTimeoutError: replica 0 waited 0.01 s in vain for replicas [1]: ...
    """


class WorkerLostError(DvKernelsError, ConnectionError):
    """Another process of the job has ended or cannot be reached.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import os
    >>> dv.launch(os._exit, (3,), workers=1)
    Traceback (most recent call last):
        ...
    dvkernels.errors.WorkerLostError: launch: worker 0 ended with status 3 ...
    """


class SynchronizationError(DvKernelsError, ValueError):
    """A variable's synchronization and aggregation do not allow this operation.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(2) as strategy, strategy.scope():
    ...     loss = dv.Variable(0.0)
    ...     strategy.run(lambda: loss.assign(1.0))
    Traceback (most recent call last):
        ...
    dvkernels.errors.SynchronizationError: assign of variable ... needs an aggregation: ...
    """


class ContextError(DvKernelsError, RuntimeError):
    """The call is not allowed in this context, or belongs to another strategy or replica.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(2) as strategy:
    ...     strategy.run(lambda: strategy.reduce("sum", 1.0))
    Traceback (most recent call last):
        ...
    dvkernels.errors.ContextError: ...
    """


class CallCancelledError(DvKernelsError, RuntimeError):
    """A call scheduled on a coordinator was not made: one before it failed, or it was closed.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.ParameterServerStrategy(num_workers=1) as strategy:
    ...     coordinator = dv.ClusterCoordinator(strategy)
    ...     failing = coordinator.schedule(lambda: 1 / 0)
    ...     cancelled = coordinator.schedule(lambda: 2)
    ...     try:
    ...         coordinator.join()
    ...     except ZeroDivisionError:
    ...         cancelled.fetch()
    Traceback (most recent call last):
        ...
    dvkernels.errors.CallCancelledError: call 1 of <lambda> was cancelled: ...
    """


class CheckpointError(DvKernelsError, ValueError):
    """A checkpoint is damaged or does not fit the objects to restore.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.Checkpoint(step=1).restore(None)
    Traceback (most recent call last):
        ...
    dvkernels.errors.CheckpointError: Checkpoint.restore: expected a path; got None, a NoneType
    """


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is missing, truncated, altered or unreadable.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import pathlib, tempfile
    >>> checkpoint = dv.Checkpoint(step=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(f"{folder}/saved")
    ...     _ = pathlib.Path(folder, "saved", "manifest.json").write_text("")
    ...     checkpoint.restore(f"{folder}/saved")
    Traceback (most recent call last):
        ...
    dvkernels.errors.CheckpointDamagedError: ...: expected a first line with ...
    """


class DatasetError(DvKernelsError, ValueError):
    """A dataset cannot be built, split or resumed as requested.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> dv.Dataset.from_arrays(np.arange(3)).batch(0)
    Traceback (most recent call last):
        ...
    dvkernels.errors.DatasetError: batch: expected size to be an integer of at least 1; got 0; ...
    """


class NonFiniteError(DvKernelsError, FloatingPointError):
    """In debug mode: an array contains NaN or infinity.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(2) as strategy, dv.debug():
    ...     strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.nan))
    Traceback (most recent call last):
        ...
    dvkernels.errors.NonFiniteError: all_reduce: 1 NaN and 0 infinite of 1 elements, ...
    """


class DriftError(DvKernelsError, RuntimeError):
    """In debug mode: copies of a variable differ that should be equal.

    Examples
    --------
    >>> import dvkernels as dv
    >>> values = iter([1.0, 2.0])
    >>> with dv.MirroredStrategy(2) as strategy, strategy.scope(), dv.debug():
    ...     weight = dv.Variable(0.0)
    ...     strategy.update(weight, lambda copy: copy.assign(next(values)))
    Traceback (most recent call last):
        ...
    dvkernels.errors.DriftError: ...
    """


class TraceError(DvKernelsError, ValueError):
    """Files are not traces of the workers of one job.

    Examples
    --------
    ``python -m dvkernels report`` prints it, and exits with status 2.

    >>> import dvkernels as dv
    >>> issubclass(dv.errors.TraceError, dv.errors.DvKernelsError)
    True
    """
