"""Ask server: answers questions about this process, over a Unix socket in a private folder.

A thread waits for questions, which costs nothing until one comes; it takes no lock of the program,
so it answers while replicas hang. Where foreign code holds the interpreter's lock it cannot: then
``faulthandler`` writes all stacks to a file, on a signal (:func:`stacks_signal`).
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, final

from dvkernels import thread_frames, user_errors
from dvkernels.profiler import collective_hooks, memory_report, process_identity
from dvkernels.profiler.collective_hooks import CollectiveEvent
from dvkernels.profiler.debugging import LOGGER
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch

__all__: list[str] = []

VARIABLE = "DVKERNELS_ASK"  # "0": no server
_MOST_QUESTION_NBYTES = 4096
_SECONDS_FOR_A_QUESTION = 5.0
_MOST_SECONDS_TO_WATCH = 60.0
_SECONDS_TO_STOP = 0.2

Section = Callable[[], Any]
_sections: dict[str, Section] = {}


def register_section(name: str, section: Section) -> None:
    """Register a function that returns a part of each answer, as JSON can represent it."""
    _sections[name] = section


def folder_of(uid: int) -> Path:
    """Return the folder of the sockets of a user's processes."""
    return Path(f"/tmp/dvkernels-{uid}")


def socket_of(pid: int, uid: int) -> Path:
    """Return the path of a process's socket."""
    return folder_of(uid) / f"{pid}.sock"


def stacks_of(pid: int, uid: int) -> Path:
    """Return the path of the file to which a process writes its stacks on the signal."""
    return folder_of(uid) / f"{pid}.stacks"


def stacks_signal() -> int:
    """Return the number of the signal on which a process writes its stacks."""
    return int(getattr(signal, "SIGRTMIN", 0)) + 6


@final
class _AskServer:
    """Server of this process: its socket, its thread, and the file of the stacks."""

    def __init__(self) -> None:
        uid = os.getuid()
        _open_private_folder(folder_of(uid))
        _remove_stale(folder_of(uid))
        self.pid = os.getpid()
        self._path = socket_of(self.pid, uid)
        self._stacks_path = stacks_of(self.pid, uid)
        self._made: list[Path] = []  # its own files, which it removes
        self._stacks: BinaryIO | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self._path))  # the folder keeps others out
            self._made.append(self._path)
            self._path.chmod(0o600)
            self._listener.listen(8)
            self._register_stacks()
            self._thread = StoppableThread(self._serve, "dvkernels-ask", self._wake)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    @property
    def is_reachable(self) -> bool:
        """Whether the socket has its name still, and its thread runs."""
        return self._path.exists() and self._listener.fileno() != -1

    def stop(self) -> bool:
        """Stop the thread, which closes the server; return whether it has ended in time."""
        self._thread.stop()
        return self._thread.wait(_SECONDS_TO_STOP)

    def close(self) -> None:
        """Close the socket, and remove its files unless they are the parent's."""
        with contextlib.suppress(OSError, ValueError):
            self._listener.close()
        if self._stacks is not None:
            faulthandler.unregister(stacks_signal())
            self._stacks.close()
        if self.pid == os.getpid():
            for path in self._made:
                with contextlib.suppress(OSError):  # a program that has become another user
                    path.unlink()

    def _register_stacks(self) -> None:
        """Let the signal write the stacks, unless the program uses that signal itself."""
        number = stacks_signal()
        if not hasattr(faulthandler, "register") or signal.getsignal(number) != signal.SIG_DFL:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        self._stacks = open(os.open(self._stacks_path, flags, 0o600), "r+b", buffering=0)  # noqa: SIM115
        self._made.append(self._stacks_path)
        faulthandler.register(number, self._stacks, all_threads=True, chain=False)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept

    def _serve(self, stop: Latch) -> None:
        try:
            while not stop.is_open:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # shut down
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(_SECONDS_FOR_A_QUESTION)
                    connection.sendall(json.dumps(_reply(connection)).encode())
        finally:
            self.close()


def _open_private_folder(folder: Path) -> None:
    """Make the folder; ``PermissionError`` if it is there and others may enter it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    if not is_private or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder that this user alone may enter")


def _remove_stale(folder: Path) -> None:
    """Remove the files of processes that were killed: nobody listens to their sockets.

    A process of another pid namespace is not in ``/proc``, but answers.
    """
    for path in folder.glob("*.sock"):
        if path.stem.isdecimal() and not Path(f"/proc/{path.stem}").exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    for each in (path, path.with_suffix(".stacks")):
                        each.unlink(missing_ok=True)
                except OSError:  # it is gone, or has no time
                    pass


def _reply(connection: socket.socket) -> dict[str, Any]:
    try:
        line = connection.makefile("rb").readline(_MOST_QUESTION_NBYTES)
        question = json.loads(line)
        seconds = min(float(question.get("watch", 0.0)), _MOST_SECONDS_TO_WATCH)
        return _answer(seconds, int(question.get("last", 20)))
    except Exception as error:
        return {"error": user_errors.describe(error)}


def _answer(watch_seconds: float, last: int) -> dict[str, Any]:
    """Return what is known of this process, after watching its collectives for a while."""
    identity = process_identity.describe()
    watched = _watched(watch_seconds, last)
    answer: dict[str, Any] = {
        "pid": identity.pid,
        "worker": identity.worker,
        "num_workers": identity.num_workers,
        "host": identity.host,
        "program": sys.argv,
        "unix_seconds": time.time(),
        "watched_seconds": watch_seconds,
        "collectives": watched,
        "memory": _memory(),
        "threads": [*_threads()],
    }
    for name, section in list(_sections.items()):
        try:
            answer[name] = section()
        except Exception as error:  # the program goes on meanwhile
            answer[name] = {"error": user_errors.describe(error)}
    return answer


class _Watcher:
    """Observer that keeps the last collectives."""

    before = None  # a call that has not ended is seen in its replica

    def __init__(self, last: int) -> None:
        self.ended: collections.deque[CollectiveEvent] = collections.deque(maxlen=max(1, last))

    def after(self, event: CollectiveEvent) -> None:
        """Keep the event."""
        self.ended.append(event)

    abort = after


def _watched(seconds: float, last: int) -> list[dict[str, Any]]:
    if seconds <= 0:
        return []
    watcher = _Watcher(last)
    collective_hooks.add_observer(watcher)
    try:
        time.sleep(seconds)
    finally:
        collective_hooks.remove_observer(watcher)
    now = time.perf_counter_ns()
    return [
        {
            "call": str(event), "replica": event.replica, "step": event.place.step,
            "strategy": event.place.strategy, "bytes": event.nbytes,
            "seconds": (event.ended - event.began) / 1e9, "seconds_ago": (now - event.ended) / 1e9,
        }
        for event in list(watcher.ended)
    ]  # fmt: skip


def _memory() -> dict[str, Any]:
    report = memory_report.memory()
    return {
        "by_device": report.by_device, "peak_by_device": report.peak_by_device,
        "process": report.process_nbytes, "process_peak": report.process_peak_nbytes,
    }  # fmt: skip


def _threads() -> Iterator[dict[str, Any]]:
    """Yield the Python stack of each thread, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    for ident, frame in thread_frames.current_frames().items():
        if ident != own:
            stack = [
                f"{each.f_code.co_filename}:{each.f_lineno} in {each.f_code.co_name}"
                for each in thread_frames.stack_of(frame)
            ]
            yield {"ident": ident, "name": names.get(ident, "?"), "stack": stack[::-1]}


_servers: list[_AskServer] = []  # at most one
_starting = threading.RLock()  # held by the one thread that looks after the server
_SECONDS_BETWEEN_TRIES = 1.0
_tried_at = float("-inf")  # when the last server could not be started


def ensure_running() -> None:
    """Start the server of this process, unless it runs or is switched off.

    A process without one works all the same: where it cannot be started, the log says why.
    """
    is_possible = hasattr(socket, "AF_UNIX") and hasattr(os, "getuid")
    if os.environ.get(VARIABLE) == "0" or not is_possible:
        return
    try:
        if _starting.acquire(blocking=False):  # else another thread is at it
            _start_unless_reachable()
    finally:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            _starting.release()
        except RuntimeError:  # not acquired
            pass


def _start_unless_reachable() -> None:
    global _tried_at
    if _servers:
        if _servers[0].is_reachable or not _servers[0].stop():
            return
        _servers.clear()  # somebody had emptied the folder, or ended the thread
    if time.monotonic() - _tried_at < _SECONDS_BETWEEN_TRIES:  # for want of threads or files, say
        return
    try:
        _servers.append(_AskServer())
    except (OSError, RuntimeError) as error:
        _tried_at = time.monotonic()
        LOGGER.warning("python -m dvkernels ask cannot ask this process: %s", error)


def _forget() -> None:
    """Close the parent's socket in a forked child, which has no thread for it."""
    global _starting
    _starting = threading.RLock()  # a thread of the parent may have held it
    for server in _servers:
        server.close()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
