"""Memory report: bytes by device and owner, as reported by the modules that own arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryReport", "memory"]

OWNERS = ("variables", "slots", "workspaces", "prefetch", "batches")

# Yields (device, owner, bytes) of all arrays that a module holds at the moment.
Account = Callable[[], Iterable[tuple[str, str, int]]]
_accounts: list[Account] = []


def register_account(account: Account) -> None:
    """Register a function that every report calls."""
    _accounts.append(account)


@dataclass(frozen=True)
class MemoryReport:
    """Result of :func:`memory`, in bytes.

    Attributes
    ----------
    by_device : dict of dict
        Bytes by device, such as ``"cpu:0"``, and owner: ``"variables"`` (their copies),
        ``"slots"`` (of optimizers), ``"workspaces"`` (arrays in which writes are computed),
        ``"prefetch"`` (prefetched batches) and ``"batches"`` (memory of batches that nobody holds
        any more, kept for the next ones).
    process_nbytes : int or None
        Resident memory of the process; None where the system does not report it.
    process_peak_nbytes : int or None
        The peak of the resident memory so far; None where the system does not report it.
    """

    by_device: dict[str, dict[str, int]]
    process_nbytes: int | None
    process_peak_nbytes: int | None

    @property
    def nbytes(self) -> int:
        """The sum over all devices and owners."""
        return sum(sum(owners.values()) for owners in self.by_device.values())

    def __str__(self) -> str:
        width = max([6, *map(len, self.by_device)])
        lines = [f"{'device':{width}}" + "".join(f"{owner:>14}" for owner in OWNERS)]
        for device, owners in sorted(self.by_device.items()):
            cells = "".join(f"{_shown(owners[owner]):>14}" for owner in OWNERS)
            lines.append(f"{device:{width}}{cells}")
        own, peak = _shown(self.process_nbytes), _shown(self.process_peak_nbytes)
        return "\n".join([*lines, f"process: {own}, at most {peak}"])


def memory() -> MemoryReport:
    """Report the bytes that the library holds by device and owner, and those of the process.

    Returns
    -------
    MemoryReport
        Printing it shows a table.

    Examples
    --------
    >>> import dvkernels as dv
    >>> import numpy as np
    >>> table = dv.Variable(np.zeros(1000))
    >>> dv.profiler.memory().by_device["cpu:0"]["variables"] >= 8000
    True
    """
    by_device: dict[str, dict[str, int]] = {}
    for account in _accounts:
        for device, owner, nbytes in account():
            owners = by_device.setdefault(device, dict.fromkeys(OWNERS, 0))
            owners[owner] += nbytes
    return MemoryReport(by_device, *_of_process())


def _of_process() -> tuple[int | None, int | None]:
    now = peak = None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        pass
    if now is not None and peak is not None:
        peak = max(now, peak)  # two counters of the system, not updated at the same time
    return now, peak


def _shown(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"
