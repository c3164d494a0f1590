"""Memory that a benchmark may use without swapping."""

from __future__ import annotations

import os

__all__ = ["available_nbytes"]


def available_nbytes() -> int:
    """Return the bytes that Linux reports as available, elsewhere half of the physical memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30
