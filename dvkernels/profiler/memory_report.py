"""Memory report: bytes by device and owner, now and at most.

An object that owns arrays keeps a :class:`Holding` for them, which adds its bytes to the account of
its owner and subtracts them with the object's end. So every report, and every sample of a trace,
comes from the same accounts.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryReport", "memory"]

OWNERS = ("variables", "slots", "workspaces", "prefetch", "batches", "staging", "checkpoints")


class _Account:
    """Bytes of one owner on one device: at present, and the most so far."""

    __slots__ = ("now", "peak")

    def __init__(self) -> None:
        self.now = self.peak = 0

    def change(self, nbytes: int) -> None:
        # One statement without a call: no other thread and no interrupt comes in between.
        self.now += nbytes
        if self.now > self.peak:
            self.peak = self.now


_accounts: dict[tuple[str, str], _Account] = {}  # by device and owner


def _account(device: str, owner: str) -> _Account:
    found = _accounts.get((device, owner))
    return found or _accounts.setdefault((device, owner), _Account())


class Holding:
    """Bytes that an object of this package holds on a device, counted as long as this lives."""

    __slots__ = ("_account", "_device", "_nbytes")

    def __init__(self, device: str, owner: str, nbytes: int) -> None:
        self._device, self._nbytes = device, nbytes
        self._account = _account(device, owner)
        self._account.change(nbytes)

    def move_to(self, owner: str) -> None:
        """Count the bytes as another owner's from now on."""
        self._account.change(-self._nbytes)
        self._account = _account(self._device, owner)
        self._account.change(self._nbytes)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt may have ended __init__ early
            self._account.change(-self._nbytes)


# Yields (device, owner, bytes) of arrays that a module counts only when it is asked.
Count = Callable[[], Iterable[tuple[str, str, int]]]
_counts: list[Count] = []


def register_account(count: Count) -> None:
    """Register a function that every report calls."""
    _counts.append(count)


_counted: set[tuple[str, str]] = set()  # the accounts that hold what has been counted


def _update_counts() -> None:
    found = dict.fromkeys(_counted, 0)
    for count in _counts:
        for device, owner, nbytes in count():
            found[device, owner] = found.get((device, owner), 0) + nbytes
    for (device, owner), nbytes in found.items():
        account = _account(device, owner)
        account.now = nbytes
        account.peak = max(account.peak, nbytes)
    _counted.update(found)


@dataclass(frozen=True)
class MemoryReport:
    """Result of :func:`memory`, in bytes.

    Attributes
    ----------
    by_device : dict of dict
        Bytes by device, such as ``"cpu:0"``, and owner: ``"variables"`` (their copies),
        ``"slots"`` (of optimizers), ``"workspaces"`` (arrays in which writes are computed),
        ``"prefetch"`` (prefetched batches), ``"batches"`` (memory of batches that nobody holds
        any more, kept for the next ones), ``"staging"`` (buffers between hosts, processes and
        GPUs) and ``"checkpoints"`` (copies of what a save in the background writes).
    peak_by_device : dict of dict
        The most bytes so far, of each owner by itself. Those of ``"batches"`` are the most that
        any report, or a trace, has seen.
    process_nbytes : int or None
        Resident memory of the process; None where the system does not report it.
    process_peak_nbytes : int or None
        The peak of the resident memory so far; None where the system does not report it.

    Examples
    --------
    >>> import dvkernels as dv
    >>> isinstance(dv.profiler.memory(), dv.profiler.MemoryReport)
    True
    """

    by_device: dict[str, dict[str, int]]
    peak_by_device: dict[str, dict[str, int]]
    process_nbytes: int | None
    process_peak_nbytes: int | None

    @property
    def nbytes(self) -> int:
        """The sum over all devices and owners."""
        return sum(sum(owners.values()) for owners in self.by_device.values())

    def __str__(self) -> str:
        width = max([9, *map(len, self.peak_by_device)])
        none = dict.fromkeys(OWNERS, 0)
        lines = [f"{'device':{width}}" + "".join(f"{owner:>13}" for owner in OWNERS)]
        for device, most in sorted(self.peak_by_device.items()):
            lines.append(_row(device, width, self.by_device.get(device, none)))
            lines.append(_row("  at most", width, most))
        own, peak = size_text(self.process_nbytes), size_text(self.process_peak_nbytes)
        return "\n".join([*lines, f"process: {own}, at most {peak}"])


def _row(name: str, width: int, owners: dict[str, int]) -> str:
    return f"{name:{width}}" + "".join(f"{size_text(owners[owner]):>13}" for owner in OWNERS)


def memory() -> MemoryReport:
    """Report the bytes that the library holds by device and owner, and those of the process.

    Each with the most so far.

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
    _update_counts()
    by_device: dict[str, dict[str, int]] = {}
    peaks: dict[str, dict[str, int]] = {}
    for (device, owner), account in list(_accounts.items()):
        for report, nbytes in ((by_device, account.now), (peaks, account.peak)):
            if nbytes:
                report.setdefault(device, dict.fromkeys(OWNERS, 0))[owner] = nbytes
    return MemoryReport(by_device, peaks, *_of_process())


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


def size_text(nbytes: int | None) -> str:
    """Return a number of bytes in a unit that fits."""
    if nbytes is None:
        return "unknown"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"
