"""Cache of compiled code between processes: one folder, outside of the package.

    ROOT/dvkernels/DIGEST/MODULE.FUNCTION-KEY.code

ROOT is ``NUMBA_CACHE_DIR`` if that is set, else the user's cache folder, else a private folder in
the temporary directory; where none is usable, code is compiled anew in each process. DIGEST is a
digest of everything that determines the compiled code: the sources of this folder, and the
versions of Python, Numba and LLVM. So an edit of any function, called by others or not, starts a
new folder, and no file of an older one is read. KEY is a digest of the function's types, its
closure and the processor.

A file is a checksum followed by the body. It is written under a temporary name and then renamed,
so that any number of processes may fill one folder at once, also over a network. A file that is
damaged, stale or unreadable counts as missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config

from dvkernels._version import __version__

__all__ = ["describe", "digest", "folder", "read", "stamp", "write"]

_HERE = Path(__file__).resolve().parent
_DIGEST_NBYTES = 16
_FOLDER = re.compile("[0-9a-f]{32}")
_MOST_FOLDERS = 16  # of other versions and edited sources; some MB each
_RENEWED_SECONDS = 24 * 3600.0  # a folder in use is never older than that
_config: Any = config  # its names are missing from the stubs

_has_warned = False  # that compiled code cannot be cached


def digest(*contents: bytes) -> str:
    """Return one hexadecimal digest of all contents."""
    found = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    for content in contents:
        found.update(b"%d:" % len(content) + content)
    return found.hexdigest()


def _versions() -> str:
    parts = (__version__, sys.version, numba.__version__, llvmlite.__version__)
    return " ".join(map(str, parts))


def _sources() -> Iterator[bytes]:
    """Yield the names and contents of the sources of compiled code."""
    for path in sorted([*_HERE.glob("*.py"), *(_HERE / "cpu").rglob("*.py")]):
        yield path.name.encode()
        yield path.read_bytes()


@functools.cache
def stamp(path: str) -> bytes:
    """Return the content of a source file; empty where the folder's digest covers the file."""
    if _HERE in Path(path).resolve().parents:
        return b""
    try:
        return Path(path).read_bytes()
    except OSError:  # from an archive, or an interactive session
        return b""


@functools.cache
def folder() -> Path | None:
    """Return the folder of this version of the code, made if need be; None where none is usable."""
    name = digest(_versions().encode(), *_sources())
    for root, is_ours in _roots():
        found = root / "dvkernels" / name
        with contextlib.suppress(OSError):
            is_new = not found.is_dir()
            found.mkdir(parents=True, exist_ok=True)
            if is_ours and not _is_trusted(found):
                continue
            if os.access(found, os.W_OK | os.X_OK):
                _keep_few(found, is_new)
                return found
        with contextlib.suppress(OSError):  # filled ahead, and now on a read-only file system
            if any(found.iterdir()) and not (is_ours and not _is_trusted(found)):
                return found
    return None


def _roots() -> Iterator[tuple[Path, bool]]:
    """Yield the possible roots, the best first, and whether each must belong to this user."""
    if _config.CACHE_DIR:
        yield Path(_config.CACHE_DIR).absolute(), False
        return
    with contextlib.suppress(RuntimeError):  # no home
        yield _user_cache(), True
    with contextlib.suppress(OSError):  # no temporary directory either
        yield _private(Path(tempfile.gettempdir())), True


def _user_cache() -> Path:
    """Return this user's cache folder, by the platform's convention."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    wanted = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return wanted if wanted.is_absolute() else Path.home() / ".cache"


def _private(temporary: Path) -> Path:
    """Return a folder closed to other users; raise OSError where another user has planted one."""
    found = temporary / f"dvkernels-{_user()}"
    with contextlib.suppress(FileExistsError):
        found.mkdir(mode=0o700)
    status = found.lstat()
    if not stat.S_ISDIR(status.st_mode) or (
        os.name == "posix" and (status.st_uid != _user() or status.st_mode & 0o077)
    ):
        raise PermissionError(f"{found} is not a private folder of this user")
    return found


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _is_trusted(found: Path) -> bool:
    """Return whether this user or root owns a folder, whose files will be executed."""
    return os.name != "posix" or found.stat().st_uid in (_user(), 0)


def _keep_few(found: Path, is_new: bool) -> None:
    """Remove the least recently used folders beyond the limit; mark this one as used."""
    if not is_new:
        if time.time() - found.stat().st_mtime > _RENEWED_SECONDS:
            os.utime(found)
        return
    others = [path for path in found.parent.iterdir() if _FOLDER.fullmatch(path.name)]
    others = [path for path in others if path != found and not path.is_symlink()]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_MOST_FOLDERS - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def read(name: str) -> bytes | None:
    """Return the body written under a name; None where it is missing, damaged or unreadable."""
    found = folder()
    if found is None:
        return None
    try:
        content = (found / name).read_bytes()
    except OSError:  # never written, no permission, or a stale handle of a network file system
        return None
    checksum, body = content[:_DIGEST_NBYTES], content[_DIGEST_NBYTES:]
    return body if bytes.fromhex(digest(body)) == checksum else None


def write(name: str, body: bytes) -> None:
    """Write a body under a name, if possible; warn at the first failure."""
    global _has_warned
    found = folder()
    try:
        if found is None:
            raise FileNotFoundError("there is no folder that can be written")
        found.mkdir(parents=True, exist_ok=True)
        aside = found / f"{name}.{secrets.token_hex(8)}.part"
        try:
            with open(aside, "xb") as file:
                file.write(bytes.fromhex(digest(body)) + body)
            os.replace(aside, found / name)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
    except OSError as error:
        if not _has_warned:
            _has_warned = True
            warnings.warn(
                f"compiled code cannot be kept, and is compiled again in each process: {error}; "
                "set NUMBA_CACHE_DIR to a folder that can be written, or fill one ahead: "
                "NUMBA_CACHE_DIR=... python -m dvkernels compile",
                RuntimeWarning,
                stacklevel=2,
            )


def describe() -> str:
    """Return a sentence: the folder of compiled code, and whether it can be written."""
    found = folder()
    if found is None:
        return "nowhere, compiled in each process: no folder can be written; set NUMBA_CACHE_DIR"
    is_writable = os.access(found, os.W_OK | os.X_OK)
    return f"{found} ({'can be written' if is_writable else 'can be read only'})"
