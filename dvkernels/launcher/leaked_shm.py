"""Removal of the shared-memory files that are left behind when workers are killed.

MPI libraries create named shared memory and unlink it when they end in order. A killed worker
leaves megabytes in ``/dev/shm`` until the machine is rebooted. So the files that processes of the
job hold are noted while the processes live. Only files with the names below are removed: those of
the program itself and those of other jobs stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, final

from dvkernels.cluster import launcher_environment
from dvkernels.cluster.host_group import HostGroup

__all__ = ["Leftovers", "host_group"]

_MEMORY = "/dev/shm"
_PROC = Path("/proc")
# MPICH, UCX, Intel MPI, libfabric's PSM; of Hydra, in the temporary folder; Open MPI.
_NAMES = re.compile(
    r"mpich_sh(m|ar)_\w+|ucx_shm_posix_\w+|Intel_MPI_\w+|psm[23]_shm[\w.-]+|hydra_hwloc_xmlfile_\w+"
    r"|(sm|vader)_segment\.[\w.-]+|osc_(sm|rdma)[\w.-]+|open_mpi\.\w+"
)
# inotify: the mask of creations, and the header of an event, which its name follows. More events
# than 64 KiB hold are read in the next call.
_CREATED = 0x100
_EVENT = struct.Struct("iIII")
_NBYTES = 1 << 16


class _File(NamedTuple):
    """A file, identified by device and inode: its path may come to name another file."""

    path: str
    device: int
    inode: int


@final
class Leftovers:
    """Shared-memory and temporary files that the processes of one job hold.

    Parameters
    ----------
    processes : callable
        Returns the pids of the job's living processes.
    folders : iterable of str, optional
        The folders to watch; default: that of shared memory, and those of temporary files.

    Attributes
    ----------
    wakeup_fd : int
        A descriptor that is readable when files were created; -1 where there is no inotify.
    """

    def __init__(
        self,
        processes: Callable[[], Iterable[int]],
        folders: Iterable[str] = (_MEMORY, "/tmp", tempfile.gettempdir()),
    ) -> None:
        self._processes = processes
        self._folders = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
        self.wakeup_fd = _watch(self._folders)
        self._before = {file for folder in self._folders for file in _existing_in(folder)}
        self._noted: set[_File] = set()

    def note(self) -> None:
        """Note the files that the job holds, if any were created since the last call."""
        if self.wakeup_fd >= 0 and any(map(_NAMES.fullmatch, _created(self.wakeup_fd))):
            self._noted.update(*map(_open_files, self._processes()))

    def remove(self, launcher_pid: int) -> None:
        """Remove the noted files that still exist, once no process of the job is left.

        Also removes the session folder of Open MPI's launcher, which its pid names.
        """
        for folder in self._folders:
            session = os.path.join(folder, f"ompi.{launcher_pid}")
            with contextlib.suppress(OSError):
                if os.lstat(session).st_uid == os.geteuid():
                    shutil.rmtree(session)  # follows no symbolic links
        for file in self._noted - self._before:
            if _file(file.path) == file:
                with contextlib.suppress(OSError):
                    os.unlink(file.path)

    def close(self) -> None:
        """Stop watching."""
        if self.wakeup_fd >= 0:
            os.close(self.wakeup_fd)


@contextlib.contextmanager
def host_group(num_workers: int, is_local: bool = True) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a new host group, but its ranks; remove its file.

    The file has its name only until all workers have come, unless all are killed before that. None
    where a launcher connects the workers: ``is_local`` is False.
    """
    if not is_local:
        yield {}
        return
    name, token = f"dvkernels-launch-{secrets.token_hex(8)}", secrets.token_hex(16)
    path = HostGroup(name, 0, num_workers, token).path
    try:
        yield {
            launcher_environment.GROUP: str(path),
            launcher_environment.TOKEN: token,
            launcher_environment.SIZE: str(num_workers),
        }
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _existing_in(folder: str) -> Iterator[_File]:
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _NAMES.fullmatch(name):
                yield from filter(None, [_file(os.path.join(folder, name))])


def _file(path: str, link: str | None = None) -> _File | None:
    """Return the file at ``path``, None if there is none; ``link`` is a link of /proc to it."""
    try:
        status = os.stat(link or path, follow_symlinks=link is not None)
    except OSError:
        return None
    return _File(path, status.st_dev, status.st_ino)


def _open_files(pid: int) -> Iterator[_File]:
    """Yield the files with the names above that a process has open or mapped.

    Open files come first: a library opens a file, maps it, and closes it afterwards.
    """
    folder = _PROC / str(pid)
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
    """Return an inotify descriptor of files created in the folders, -1 where there is none."""
    try:
        watch: int = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    except AttributeError:
        return -1
    for folder in folders:
        _LIBC.inotify_add_watch(watch, os.fsencode(folder), _CREATED)
    return watch


def _created(watch: int) -> Iterator[str]:
    """Yield the names of the files created since the last call."""
    try:
        events = os.read(watch, _NBYTES)
    except OSError:  # none
        return
    offset = 0
    while offset < len(events):
        *_, length = _EVENT.unpack_from(events, offset)
        offset += _EVENT.size + length
        yield os.fsdecode(events[offset - length : offset].rstrip(b"\0"))


_LIBC = ctypes.CDLL(None)
