"""All-reduce of many arrays at once: one launch per dtype, without a fusion buffer."""

from __future__ import annotations

from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cuda.engine import job
from dvkernels.kernels.cuda.engine.call import Call

__all__ = ["all_reduce_many"]

_VERB = "all_reduce_many"


def all_reduce_many(groups: Any, op: Any = "sum", *, stream: Any = None) -> list[list[Any]]:
    """Leave the reduction of each group in all its buffers; see :func:`dvkernels.kernels`."""
    listed = checks.groups_as_lists(_VERB, groups)
    if not listed:
        return listed
    call = Call(_VERB, stream=stream)
    arrays = [call.register(group, f"{_VERB}, array {k}") for k, group in enumerate(listed)]
    known, by_dtype = checks.check_groups(_VERB, arrays, op)
    ops = {dtype: job.check_op(_VERB, known, dtype) for dtype in by_dtype}
    with call.ordered() as work_stream:
        for dtype, found in by_dtype.items():
            job.combine(work_stream, ops[dtype], dtype, found, len(listed[0]), in_place=True)
    return listed
