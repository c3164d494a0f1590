"""How much memory may be taken without swapping."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__: list[str] = []


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what is free or can be freed, here and in this cgroup; None where nobody says."""
    known = [
        size for size in (_of_the_system(root), _of_the_cgroup(root / "sys/fs/cgroup")) if size
    ]
    return min(known) if known else None


def _of_the_system(root: Path) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text()
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    try:  # without what caches could give back
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_the_cgroup(folder: Path) -> int | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:  # "max" is no limit
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):
            continue
    return None
