"""Broadcast: the root's buffer is read once and stored to all others, whatever its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import job

__all__ = ["broadcast"]


def broadcast(buffers: Any, root: int = 0) -> list[Any]:
    """Copy ``buffers[root]`` into every buffer; see :func:`dvkernels.kernels`."""
    buffers = checks.as_sequence("broadcast", buffers)
    views = checks.arrays("broadcast", buffers)
    root = checks.check_root("broadcast", root, len(views))
    checks.check_dtype_moves("broadcast", views[0].dtype)
    checks.check_in_place("broadcast", views)
    views.insert(0, views.pop(root))
    if len(views) > 1:
        job.move([views])
    return list(buffers)


def broadcast_many_unchecked(groups: Sequence[Sequence[HostArray]]) -> None:
    """Copy the first array of each group to all its others, in one go that no interrupt cuts."""
    job.move(groups)
