"""Broadcast of any dtype in one launch: the root's buffer is read once and stored to the others."""

from __future__ import annotations

from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import job
from dvkernels.kernels.cuda.engine.call import Buffers

__all__ = ["broadcast"]


def broadcast(buffers: Any, root: int = 0, *, stream: Any = None) -> list[Any]:
    """Leave ``buffers[root]`` in every buffer; see :func:`dvkernels.kernels`."""
    call = Buffers("broadcast", buffers, None, stream)
    views = checks.arrays("broadcast", call.reads)
    root = checks.check_root("broadcast", root, len(views))
    checks.check_dtype_moves("broadcast", views[0].dtype)
    checks.check_in_place("broadcast", views)
    views.insert(0, views.pop(root))
    if len(views) > 1:
        with call.ordered() as work_stream:
            job.move(work_stream, [views])
    return list(call.results)
