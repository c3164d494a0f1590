"""Options that every strategy takes, and their checks."""

from __future__ import annotations

from dvkernels import deadlines
from dvkernels.philox import check_seed
from dvkernels.user_errors import brief
from dvkernels.values.scalar_checks import is_integer

__all__: list[str] = []


def check_options(
    *, bytes_per_bucket: object, seed: object, threads: object, timeout_seconds: object
) -> None:
    """Raise ``ValueError`` or ``TypeError`` for a wrong option, before anything is made.

    Over several workers that is before they wait for each other.
    """
    if bytes_per_bucket is not None and (
        not is_integer(bytes_per_bucket) or bytes_per_bucket <= 0  # type: ignore[operator]
    ):
        raise ValueError(f"bytes_per_bucket is a positive integer, got {bytes_per_bucket!r}")
    if not isinstance(threads, str) or threads not in ("share", "all"):
        raise ValueError(
            f"threads is 'share' (BLAS, OpenMP and Numba use at most cores // replicas threads in "
            f"each replica) or 'all' (as many as they are set to), got {brief(threads)}"
        )
    deadlines.checked(timeout_seconds)
    check_seed(seed)
