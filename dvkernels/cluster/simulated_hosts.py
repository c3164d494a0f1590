"""Simulated hosts: workers of one machine behave as if they ran on several hosts."""

from __future__ import annotations

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.errors import ClusterError

__all__ = ["VARIABLE", "host_of_each_worker"]

VARIABLE = "DVKERNELS_HOSTS"


def host_of_each_worker(environ: Environment, num_workers: int) -> list[int] | None:
    """Return the simulated host of each worker; None if the variable is not set.

    Raises
    ------
    ClusterError
        The value is not a list of workers per host that adds up to ``num_workers``.

    Examples
    --------
    >>> host_of_each_worker({"DVKERNELS_HOSTS": "3,1"}, 4)
    [0, 0, 0, 1]
    """
    text = environ.get(VARIABLE, "").strip()
    if not text:
        return None
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1 or sum(counts) != num_workers:
        raise ClusterError(
            f"{VARIABLE}={text!r}: expected the number of workers of each simulated host, such as "
            f"'2,2', {num_workers} in all; unset it to use the real hosts"
        )
    return [host for host, count in enumerate(counts) for _ in range(count)]
