"""Hosts that workers pretend to be on, to try on one machine what a program does on several."""

from __future__ import annotations

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.errors import ClusterError

__all__ = ["VARIABLE", "pretended"]

VARIABLE = "DVKERNELS_HOSTS"


def pretended(environ: Environment, num_workers: int) -> list[int] | None:
    """Return the number of each worker's host as the variable has it; None if it is not set.

    Raises
    ------
    ClusterError
        It does not say how many of ``num_workers`` workers each host has.

    Examples
    --------
    >>> pretended({"DVKERNELS_HOSTS": "3,1"}, 4)
    [0, 0, 0, 1]
    """
    said = environ.get(VARIABLE, "").strip()
    if not said:
        return None
    counts = [int(word) if word.strip().isdecimal() else 0 for word in said.split(",")]
    if min(counts) < 1 or sum(counts) != num_workers:
        raise ClusterError(
            f"{VARIABLE}={said!r}: expected how many workers each pretended host has, such as "
            f"'2,2', {num_workers} in all; unset it to take the hosts as they are"
        )
    return [host for host, count in enumerate(counts) for _ in range(count)]
