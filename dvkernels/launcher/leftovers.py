"""What the libraries under a job leave behind where its workers are killed: found, and removed.

MPI's libraries take memory that processes share under a name, and remove the name when they end in
order. A killed worker leaves it, megabytes that count against ``/dev/shm`` until the machine starts
anew. So what processes of the job hold is noted while they live. What the program makes by itself
has other names than those below, and stays; so does what other jobs hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, final

__all__ = ["Leftovers"]

_MEMORY = "/dev/shm"
_PROC = Path("/proc")
# MPICH, UCX, Intel MPI, libfabric's PSM; of Hydra, in the temporary folder; Open MPI.
_NAMES = re.compile(
    r"mpich_sh(m|ar)_\w+|ucx_shm_posix_\w+|Intel_MPI_\w+|psm[23]_shm[\w.-]+|hydra_hwloc_xmlfile_\w+"
    r"|(sm|vader)_segment\.[\w.-]+|osc_(sm|rdma)[\w.-]+|open_mpi\.\w+"
)
# Of inotify: the kind of event, and how one is told before the name. 64 KiB are all that wait, or
# the rest comes at the next look.
_CREATED = 0x100
_EVENT = struct.Struct("iIII")
_NBYTES = 1 << 16


class _File(NamedTuple):
    """A file itself, whatever its name comes to mean."""

    path: str
    device: int
    number: int


@final
class Leftovers:
    """What the processes of one job hold.

    Parameters
    ----------
    processes : callable
        Returns the numbers of the job's processes that exist.
    folders : iterable of str, optional
        Where to look; by default where shared memory has its names, and for temporary files.
    """

    def __init__(
        self,
        processes: Callable[[], Iterable[int]],
        folders: Iterable[str] = (_MEMORY, "/tmp", tempfile.gettempdir()),
    ) -> None:
        self._processes = processes
        self._folders = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
        self.news = _watch(self._folders)  # can be read when something has come into being; or -1
        self._before = {file for folder in self._folders for file in _lying_in(folder)}
        self._noted: set[_File] = set()

    def note(self) -> None:
        """Note what has come into being and is held by the job."""
        if self.news >= 0 and any(map(_NAMES.fullmatch, _created(self.news))):
            self._noted.update(*map(_held_by, self._processes()))

    def remove(self, launcher: int) -> None:
        """Remove what was noted and is still there. To be called when no process is left.

        And the folder of Open MPI's launcher, which bears the number of its process.
        """
        for folder in self._folders:
            session = os.path.join(folder, f"ompi.{launcher}")
            with contextlib.suppress(OSError):
                if os.lstat(session).st_uid == os.geteuid():
                    shutil.rmtree(session)  # which follows no links
        for file in self._noted - self._before:
            if _file(file.path) == file:
                with contextlib.suppress(OSError):
                    os.unlink(file.path)

    def close(self) -> None:
        """Watch no more."""
        if self.news >= 0:
            os.close(self.news)


def _lying_in(folder: str) -> Iterator[_File]:
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _NAMES.fullmatch(name):
                yield from filter(None, [_file(os.path.join(folder, name))])


def _file(path: str, shown: str | None = None) -> _File | None:
    """Return the file of a name; with ``shown`` that of another path, under this name."""
    try:
        status = os.stat(shown or path, follow_symlinks=shown is not None)
    except OSError:
        return None
    return _File(path, status.st_dev, status.st_ino)


def _held_by(process: int) -> Iterator[_File]:
    """Yield the files of the names above that a process has open, or in its memory.

    In this order: what is made is open first, and closed when it lies in the memory.
    """
    folder = _PROC / str(process)
    with contextlib.suppress(OSError):
        for number in os.listdir(folder / "fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(folder / "fd" / number)
                if _NAMES.fullmatch(os.path.basename(path)):
                    yield from filter(None, [_file(path, str(folder / "fd" / number))])
    with contextlib.suppress(OSError), open(folder / "maps", errors="replace") as lines:
        for line in lines:
            # 7f6b-7f6c rw-s 00000000 00:1b 70      /dev/shm/name
            _, _, _, device, inode, *last = line.split(maxsplit=5)
            name = "".join(last).rstrip("\n")
            if _NAMES.fullmatch(os.path.basename(name)):
                major, minor = (int(part, 16) for part in device.split(":"))
                yield _File(name, os.makedev(major, minor), int(inode))


def _watch(folders: Iterable[str]) -> int:
    """Return a descriptor that tells what comes into being, -1 where there is no such thing."""
    try:
        watch: int = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    except AttributeError:
        return -1
    for folder in folders:
        _LIBC.inotify_add_watch(watch, os.fsencode(folder), _CREATED)
    return watch


def _created(watch: int) -> Iterator[str]:
    """Yield the names of what has come into being since the last time."""
    try:
        text = os.read(watch, _NBYTES)
    except OSError:  # nothing
        return
    place = 0
    while place < len(text):
        *_, length = _EVENT.unpack_from(text, place)
        place += _EVENT.size + length
        yield os.fsdecode(text[place - length : place].rstrip(b"\0"))


_LIBC = ctypes.CDLL(None)
