"""File of a host group: memory that its processes map, made and opened so that no others get in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import mmap
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from dvkernels._version import __version__
from dvkernels.cluster import procfs
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.shm import available
from dvkernels.communicators.workers.shm.segment import read_text, write_text
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, CollectiveTimeoutError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__: list[str] = []

HEADER_NBYTES: Final = 4096
OPEN: Final = 0  # the state of a group that waits for its processes
_HEADER: np.dtype[Any] = np.dtype(
    [
        ("magic", "i8"),  # of a version of the package, whose processes have one layout
        ("size", "i8"),
        ("host", "i8"),
        ("process_namespace", "i8"),
        ("state", "i8"),
        ("token", "u1", 32),  # its digest
        ("text", "u1", 2048),  # why the group has ended
    ]
)
# O_NONBLOCK: a pipe is refused, not waited for. O_TEMPORARY: Windows removes the file with its
# last handle.
_FLAGS = os.O_RDWR
for _name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_TEMPORARY", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


@final
class GroupFile:
    """Open file of a host group: a header, the segment, and later the symmetric memory.

    Its header is changed under :meth:`locked` only. ``memory`` has the bytes after the header.
    """

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._hidden: Path | None = None  # the name before that of the group
        self._nbytes = nbytes
        mapped = self._map(0, nbytes)
        self._header = mapped[: _HEADER.itemsize].view(_HEADER)
        self.memory = mapped[HEADER_NBYTES:]

    @staticmethod
    def create(path: Path, size: int, token: bytes, nbytes: int, allocated: int) -> GroupFile:
        """Return a new file without its name, the first bytes of which are ``allocated``."""
        hidden: Path | None = None
        try:
            descriptor, hidden = _create_unnamed(path.parent)
            try:
                os.ftruncate(descriptor, nbytes)
                file = GroupFile(path, descriptor, nbytes)
            except BaseException:
                os.close(descriptor)
                raise
            file._hidden = hidden
            file.allocate(0, HEADER_NBYTES + allocated)
        except OSError as error:
            if hidden is not None:
                hidden.unlink()
            raise refusal(path, f"it cannot be made: {error.strerror}") from None
        header = file._header[0]
        header["magic"], header["size"], header["token"] = _MAGIC, size, _digest(token)
        header["host"], header["process_namespace"] = (
            procfs.this_host(),
            procfs.this_process_namespace(),
        )
        return file

    @staticmethod
    def open(path: Path, token: bytes) -> GroupFile | None:
        """Return the file at a path, if it is of the group with this token; None without a file.

        Raises ``ClusterError`` if there is something else.
        """
        try:
            descriptor = os.open(path, _FLAGS)
        except FileNotFoundError:
            if path.parent.is_dir():
                return None
            raise refusal(path, "there is no such folder") from None
        except OSError as error:
            is_link = error.errno in (errno.ELOOP, errno.EMLINK)
            what = "it is a symbolic link" if is_link else error.strerror
            raise refusal(path, f"it cannot be opened: {what}") from None
        try:
            found = os.fstat(descriptor)
            _check_owner(path, found)
            head = os.read(descriptor, _HEADER.itemsize)
            if len(head) < _HEADER.itemsize or np.frombuffer(head, _HEADER)["magic"] != _MAGIC:
                raise refusal(path, f"it is not the file of a group of dvkernels {__version__}")
            file = GroupFile(path, descriptor, found.st_size)
        except BaseException:
            os.close(descriptor)
            raise
        if not hmac.compare_digest(file._header["token"][0].tobytes(), _digest(token).tobytes()):
            file.close()
            raise refusal(path, "it is of another group: their tokens differ")
        return file

    def close(self) -> None:
        """Close the file; its memory is there until the last array over it is gone."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        # An interrupt may have ended __init__ early.
        with contextlib.suppress(OSError, AttributeError):
            self.close()

    # -- the group --------------------------------------------------------------------------------

    @property
    def state(self) -> int:
        """``OPEN``, or what the processes that wait have come to."""
        return int(self._header["state"][0])

    @property
    def text(self) -> str:
        """Why the group has ended before it was complete."""
        return read_text(self._header["text"][0])

    def settle(self, state: int, text: str = "") -> None:
        """Remove the name of the file, and give all processes that wait their outcome."""
        if self.has_name:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        write_text(self._header["text"][0], text)
        self._header["state"] = state

    def difference(self, size: int) -> str | None:
        """Return what separates this process from the group, if anything."""
        header = self._header[0]
        if header["size"] != size:
            return f"it says that the group has {size} processes, and others {header['size']}"
        if header["host"] != procfs.this_host():
            return "it runs on another host; several hosts need MPI"
        if header["process_namespace"] != procfs.this_process_namespace():
            return (
                "it runs in another process namespace, where it cannot see whether the others "
                "live; let the containers share one (docker run --pid, in Kubernetes "
                "shareProcessNamespace)"
            )
        return None

    @property
    def has_name(self) -> bool:
        """Whether the path leads to this file."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def link(self) -> bool:
        """Give the file, which is complete, its name; return whether the name was free."""
        try:
            if self._hidden is None:
                # With a folder given, Python calls linkat, which follows the link to the file.
                source = f"/proc/self/fd/{self._descriptor}"
                os.link(source, self.path, src_dir_fd=self._descriptor, follow_symlinks=True)
            else:
                os.link(self._hidden, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            raise refusal(self.path, f"it cannot be made: {error.strerror}") from None
        finally:
            if self._hidden is not None:
                os.unlink(self._hidden)
        return True

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Exclude other processes. The lock of a process that ends is free."""
        if not wait.until(self._try_lock, wait.ROLL_CALL, seconds):
            raise CollectiveTimeoutError(
                f"{self.path} has been locked by another process for {seconds:g} s: was it stopped?"
            )
        try:
            yield
        finally:
            if sys.platform == "win32":
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                msvcrt.locking(self._descriptor, msvcrt.LK_UNLCK, 1)
            else:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        try:
            if sys.platform == "win32":
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    # -- memory -----------------------------------------------------------------------------------

    def free_nbytes(self) -> int:
        """Return the free bytes of the file's volume."""
        if not hasattr(os, "fstatvfs"):
            return sys.maxsize
        found = os.fstatvfs(self._descriptor)
        return found.f_bavail * found.f_frsize

    def allocate(self, start: int, nbytes: int) -> None:
        """Give a part of the file its memory; raise ``OSError`` if there is not enough.

        A page that were allocated on first touch would be fatal then (SIGBUS).
        """
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._descriptor, start, nbytes)

    def append(self, rank: int, size: int, nbytes: int) -> list[HostArray]:
        """Append memory of all processes, which all call this together; raise like `allocate`."""
        each = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        start = -(-self._nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._nbytes = start + size * each
        if os.fstat(self._descriptor).st_size < self._nbytes:
            os.ftruncate(self._descriptor, self._nbytes)
        self.allocate(start + rank * each, each)  # by its owner, for the memory of its NUMA node
        mapped = self._map(start, size * each)
        return [mapped[k * each :][:nbytes] for k in range(size)]

    def _map(self, start: int, nbytes: int) -> HostArray:
        return np.frombuffer(mmap.mmap(self._descriptor, nbytes, offset=start), np.uint8)


def refusal(path: Path, why: str) -> ClusterError:
    """Return the error for a path that is no file of the group."""
    return ClusterError(
        f"HostGroup({str(path)!r}): {why}; give all processes of a group the path of a file that "
        f"does not exist, in a folder that all of them share"
    )


def memory_refusal(path: Path, size: int, needed: int, found: int) -> str:
    """Return the message for a volume that is too small."""
    return (
        f"{size} processes need {needed:,} bytes of shared memory, and {path.parent} has "
        f"{found:,}; {available.REMEDY}, or give the path of a file in another folder"
    )


def _create_unnamed(folder: Path) -> tuple[int, Path | None]:
    """Return a new file without a name, or where there is no such thing, with a hidden one."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with contextlib.suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), None
    hidden = folder / f".dvkernels-{secrets.token_hex(8)}"
    return os.open(hidden, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600), hidden


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise refusal(path, "it is not a file")
    if sys.platform == "win32":
        return
    if found.st_uid != os.geteuid():
        raise refusal(
            path, f"it belongs to user {found.st_uid}, and this process to user {os.geteuid()}"
        )
    if stat.S_IMODE(found.st_mode) != 0o600:
        mode = stat.S_IMODE(found.st_mode)
        raise refusal(path, f"its mode is {mode:o} instead of 600, so it may be of others")


def _digest(token: bytes) -> HostArray:
    return np.frombuffer(hashlib.blake2b(token, digest_size=32).digest(), np.uint8)


_MAGIC = procfs.number_of(f"dvkernels {__version__}, host group, 1, {sys.byteorder}")
