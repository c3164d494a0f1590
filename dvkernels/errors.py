"""Every error of the library: one base class, and the builtin that fits.

A message says what was expected, what came, from which replica, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AlgorithmError",
    "BufferMismatchError",
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
    "UnsupportedDTypeError",
    "WorkerLostError",
]


class DvKernelsError(Exception):
    """The base of every error that the library raises by itself."""


class BufferMismatchError(DvKernelsError, ValueError):
    """Buffers differ in shape, dtype or device kind, overlap, or cannot be written."""


class NotABufferError(DvKernelsError, TypeError):
    """Something that is not an array was passed as a buffer."""


class UnsupportedDTypeError(DvKernelsError, TypeError):
    """The reduction is not defined for this dtype (MEAN of integers, SUM of bool, object)."""


class DeviceError(DvKernelsError, RuntimeError):
    """A device does not exist, or cannot be used here."""


class ReduceOpError(DvKernelsError, ValueError):
    """No reduction of that name."""


class AlgorithmError(DvKernelsError, ValueError):
    """No algorithm of that name."""


class ClusterError(DvKernelsError, ValueError):
    """What tells a worker its place among the others is missing, malformed or contradictory."""


class LaunchError(DvKernelsError, RuntimeError):
    """The workers of a job cannot be started here in the way that was asked for."""


class CollectiveMismatchError(DvKernelsError, RuntimeError):
    """The replicas asked for different collectives, or one of them did not take part."""


class CollectiveTimeoutError(DvKernelsError, TimeoutError):
    """A replica did not come to a collective within the deadline."""


class WorkerLostError(DvKernelsError, ConnectionError):
    """Another process of the job ended or cannot be reached."""


class SynchronizationError(DvKernelsError, ValueError):
    """A variable's synchronization and aggregation do not allow this operation."""


class ContextError(DvKernelsError, RuntimeError):
    """The call belongs into another context, strategy or replica."""


class CheckpointError(DvKernelsError, ValueError):
    """A checkpoint is damaged or does not fit the objects to restore."""


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is missing, cut off or altered, or cannot be read."""


class DatasetError(DvKernelsError, ValueError):
    """A dataset cannot be built, split or resumed the way it was asked to."""


class NonFiniteError(DvKernelsError, FloatingPointError):
    """In debug mode: NaN or infinity where there should be numbers."""


class DriftError(DvKernelsError, RuntimeError):
    """In debug mode: copies of a variable that should be equal differ."""
