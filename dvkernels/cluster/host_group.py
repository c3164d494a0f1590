"""Resolver of a group of processes of one host, which somebody else has started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import final

from dvkernels.cluster.position import Position
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.errors import ClusterError
from dvkernels.user_errors import brief

__all__ = ["HostGroup"]

_SHARED_MEMORY = Path("/dev/shm")
_NBYTES_PER_WORKER = 2 * 1024 * 1024  # at most that for the segment of two workers or more


@final
class HostGroup(ClusterResolver):
    """Resolver of processes of one host that find each other by a file; they need no MPI.

    Whoever started the processes gives each the same path, size and token, and a rank of its own:
    ``multiprocessing``, joblib, Ray, Dask, or containers that share ``/dev/shm``, the user and the
    process namespace. ``MultiWorkerMirroredStrategy(HostGroup(...))`` then waits until all have
    come. They communicate over shared memory, as the workers of one host do under MPI.

    Parameters
    ----------
    path : str or os.PathLike
        A file that does not exist, in a folder that all processes share. The first process makes
        it, for this user only, and the last to come removes its name; the memory behind it is gone
        when the last process leaves or is killed. A name without a folder is one in ``/dev/shm``,
        or in the folder for temporary files where that is missing or too small.
    rank : int
        The number of this process, from 0.
    size : int
        The number of processes.
    token : str or bytes
        A secret of this group, such as ``secrets.token_hex()``: a process with another one is
        refused. Files and messages do not hold it.

    Raises
    ------
    ClusterError
        An argument is out of range or of another type.

    Notes
    -----
    Nothing happens before the strategy is made; the object may be pickled. A group belongs to one
    strategy and ends with it: ``strategy.close()`` leaves it, and the path may be used again.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.cluster.HostGroup("/dev/shm/training", 1, 4, "secret")
    HostGroup(/dev/shm/training: worker 1 of 4, 1 of 4 on this host)
    """

    def __init__(
        self, path: str | os.PathLike[str], rank: int, size: int, token: str | bytes
    ) -> None:
        place: object = path
        text = os.fspath(place) if isinstance(place, (str, os.PathLike)) else None
        if not isinstance(text, str) or not text or "\0" in text:
            raise ClusterError(f"path: expected the path of a file; got {brief(path)}")
        _check_whole("size", size, 1)
        _check_whole("rank", rank, 0, size)
        secret: object = token
        if not isinstance(secret, (str, bytes)) or not secret:
            raise ClusterError(
                f"token: expected a text or bytes that only this group has, such as "
                f"secrets.token_hex(); got {'none' if secret in ('', b'') else type(secret)}"
            )
        self._path = _place(text, size)
        self._token = token.encode(errors="surrogatepass") if isinstance(token, str) else token
        super().__init__(str(self._path), Position("worker", rank, rank, size, rank, size))

    @property
    def path(self) -> Path:
        """The file by which the processes find each other."""
        return self._path

    @property
    def token(self) -> bytes:
        """The secret of the group."""
        return self._token


def _check_whole(name: str, value: object, low: int, end: int | None = None) -> None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else low - 1
    if number < low or (end is not None and number >= end):
        expected = f"an integer from {low}" + ("" if end is None else f" to {end - 1}")
        raise ClusterError(f"{name}: expected {expected}; got {brief(value)}")


def _place(text: str, size: int) -> Path:
    """Return the absolute path of a file, which without a folder lies in shared memory."""
    if os.path.dirname(text):
        return Path(text).absolute()
    folder = Path(tempfile.gettempdir())
    if _SHARED_MEMORY.is_dir():
        # The whole of it: what is free may differ between two processes.
        found = os.statvfs(_SHARED_MEMORY)
        if found.f_blocks * found.f_frsize >= size * _NBYTES_PER_WORKER:
            folder = _SHARED_MEMORY
    return folder / text
