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

#: Exit status of a process that was preempted and has saved.
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
    """Buffers differ in shape, dtype or device kind, overlap, or cannot be written."""


class NotABufferError(DvKernelsError, TypeError):
    """Something that is not an array was passed as a buffer."""


class UnsupportedDTypeError(DvKernelsError, TypeError):
    """The reduction is not defined for this dtype (MEAN of integers, SUM of bool, object)."""


class DeviceError(DvKernelsError, RuntimeError):
    """A device does not exist, or cannot be used here."""


class ReduceOpError(DvKernelsError, ValueError):
    """There is no reduction of that name."""


class AlgorithmError(DvKernelsError, ValueError):
    """There is no algorithm of that name, or it does not support the devices or workers."""


class ClusterError(DvKernelsError, ValueError):
    """The description of the cluster is missing, malformed or contradictory."""


class LaunchError(DvKernelsError, RuntimeError):
    """The workers of a job cannot be started as requested."""


class CollectiveMismatchError(DvKernelsError, RuntimeError):
    """The replicas called different collectives, or one of them did not take part."""


class CollectiveTimeoutError(DvKernelsError, TimeoutError):
    """A replica or worker did not arrive at a collective before the deadline."""


class WorkerLostError(DvKernelsError, ConnectionError):
    """Another process of the job has ended or cannot be reached."""


class SynchronizationError(DvKernelsError, ValueError):
    """A variable's synchronization and aggregation do not allow this operation."""


class ContextError(DvKernelsError, RuntimeError):
    """The call is not allowed in this context, or belongs to another strategy or replica."""


class CallCancelledError(DvKernelsError, RuntimeError):
    """A call scheduled on a coordinator was not made: one before it failed, or it was closed."""


class CheckpointError(DvKernelsError, ValueError):
    """A checkpoint is damaged or does not fit the objects to restore."""


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is missing, truncated, altered or unreadable."""


class DatasetError(DvKernelsError, ValueError):
    """A dataset cannot be built, split or resumed as requested."""


class NonFiniteError(DvKernelsError, FloatingPointError):
    """In debug mode: an array contains NaN or infinity."""


class DriftError(DvKernelsError, RuntimeError):
    """In debug mode: copies of a variable differ that should be equal."""


class TraceError(DvKernelsError, ValueError):
    """Files are not traces of the workers of one job."""
