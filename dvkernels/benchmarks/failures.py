"""What can be wrong with what a benchmark is asked to do."""

from __future__ import annotations

from dvkernels.errors import DvKernelsError

__all__: list[str] = []


class BenchmarkError(DvKernelsError, ValueError):
    """A benchmark was asked for something that does not exist."""


class MissingPackageError(DvKernelsError, ImportError):
    """A package of an extra is not installed."""


class ContestantLostError(DvKernelsError, RuntimeError):
    """One contestant cannot go on; the others can."""
