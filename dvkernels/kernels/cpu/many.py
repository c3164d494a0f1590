"""All-reduce of many arrays in one job, with an item for each array and no fusion buffer."""

from __future__ import annotations

from typing import Any

from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import grouped_job, recipe, thread_pool
from dvkernels.kernels.cpu.engine.job import combine_in_place, divisor, run
from dvkernels.kernels.cpu.engine.job_layout import Row

__all__ = ["all_reduce_many"]

_VERB = "all_reduce_many"


def all_reduce_many(groups: Any, op: Any = "sum") -> list[list[Any]]:
    """Leave the reduction of each group in all its buffers; see :func:`dvkernels.kernels`."""
    lists = checks.groups_as_lists(_VERB, groups)
    if lists and not _reduce_unchecked(lists, op):
        _reduce_checked(lists, op)
    return lists


def _reduce_unchecked(lists: list[list[Any]], op: Any) -> bool:
    """Reduce contiguous arrays of one dtype; False: declined, and no array was touched."""
    try:
        found = recipe.recipes[op, lists[0][0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    width = len(lists[0])
    row = Row(-1, 0, width, 0, width, width if found.is_mean else 1)
    job = grouped_job.fill(lists, found, row, width)
    if job is None or grouped_job.overlaps(job, lists, found.itemsize):
        return False
    thread_pool.execute(*job)
    return True


def _reduce_checked(lists: list[list[Any]], op: Any) -> None:
    """Check every array before any is touched, then run one job for each dtype."""
    known, by_dtype = checks.check_groups(_VERB, lists, op)
    width = len(lists[0])
    program = combine_in_place(width, divisor(known, width))
    for dtype, groups in by_dtype.items():
        recipe.register(known, dtype)
        run(known, dtype, groups, program)
