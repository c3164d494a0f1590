"""Parser of Slurm's lists of counts: ``3(x2),2,1``."""

from __future__ import annotations

import re

from dvkernels.errors import ClusterError

__all__ = ["expand"]

# Slurm supports at most 65536 nodes. The limit keeps a typing error from filling the memory.
_MOST_NODES = 1 << 17

# Compiled at first use, because most programs do not run under Slurm.
_COUNT = r"(?P<count>[1-9][0-9]*)(?:\(x(?P<times>[1-9][0-9]*)\))?"


def expand(variable: str, text: str) -> list[int]:
    """Expand a list of counts such as ``3(x2),2,1``; ``variable`` names it in messages.

    Examples
    --------
    >>> expand("SLURM_STEP_TASKS_PER_NODE", "3(x2),2,1")
    [3, 3, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(_COUNT, part)
        if match is None:
            raise ClusterError(
                f"{variable}: expected numbers such as 3(x2),2,1; {part!r} in {text!r} is not one"
            )
        times = int(match["times"] or 1)
        if len(counts) + times > _MOST_NODES:
            raise ClusterError(f"{variable}: {text!r} is for more than {_MOST_NODES} nodes")
        counts.extend([int(match["count"])] * times)
    return counts
