"""Cache of compiled code: one folder, outside of the package, whose failures cost a compilation."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import dvkernels
from dvkernels.kernels import compile_cache

PACKAGE = Path(dvkernels.__file__).parent
needs_posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Return a function that looks for the folder anew, among folders of this test only."""
    monkeypatch.setattr(compile_cache._config, "CACHE_DIR", "")
    monkeypatch.setattr(compile_cache, "_has_warned", False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(compile_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    compile_cache.folder.cache_clear()

    def look_up():
        compile_cache.folder.cache_clear()
        return compile_cache.folder()

    yield look_up
    compile_cache.folder.cache_clear()


def _root(folder, parent):
    assert folder.is_dir()
    assert folder.parent.name == "dvkernels"
    return folder.parent.parent == parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the names of Linux")
def test_the_first_folder_that_can_be_written_is_taken(found, monkeypatch, tmp_path) -> None:
    assert _root(found(), tmp_path / "home" / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert _root(found(), tmp_path / "home" / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _root(found(), tmp_path / "xdg")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    private = tmp_path / "tmp" / f"dvkernels-{os.geteuid()}"
    assert _root(found(), private)
    assert private.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compile_cache._config, "CACHE_DIR", str(tmp_path / "said"))
    assert _root(found(), tmp_path / "said")
    assert PACKAGE not in found().parents


@needs_posix
@pytest.mark.parametrize("planted", ["a link", "open to all", "a file", "of another user"])
def test_a_planted_folder_in_the_temporary_directory_is_not_used(
    found, monkeypatch, tmp_path, planted
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/none")
    place = tmp_path / "tmp" / f"dvkernels-{os.geteuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if planted == "a link":
        place.symlink_to(elsewhere)
    elif planted == "a file":
        place.touch()
    else:
        place.mkdir(mode=0o700)
        place.chmod(0o700 if planted == "of another user" else 0o777)
        if planted == "of another user":
            another = os.geteuid() + 1
            monkeypatch.setattr(compile_cache, "_user", lambda: another)
            place.rename(place.with_name(f"dvkernels-{another}"))
    assert found() is None
    assert not [*elsewhere.iterdir()]
    assert "nowhere" in compile_cache.describe()


@needs_posix
def test_code_that_another_user_could_have_written_is_not_executed(
    found, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    theirs = found()
    another = os.geteuid() + 1
    monkeypatch.setattr(compile_cache, "_user", lambda: another)
    if os.geteuid() == 0:  # the system's own is trusted
        assert found() == theirs
        os.chown(theirs, 4321, 4321)
    assert found() != theirs


def test_a_folder_filled_ahead_is_read_on_a_read_only_file_system(
    found, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(compile_cache._config, "CACHE_DIR", str(tmp_path / "image"))
    filled = found()
    compile_cache.write("name", b"body")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert found() == filled
    assert compile_cache.read("name") == b"body"
    assert "read only" in compile_cache.describe()


def test_a_damaged_file_counts_as_missing(found) -> None:
    body = bytes(range(256)) * 3
    compile_cache.write("name", body)
    path = found() / "name"
    whole = path.read_bytes()
    assert compile_cache.read("name") == body
    for length in (0, 1, 15, 16, 17, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert compile_cache.read("name") is None
    for position in (0, 15, 16, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert compile_cache.read("name") is None
    path.unlink()
    path.mkdir()
    assert compile_cache.read("name") is None
    assert compile_cache.read("never written") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_failed_write_warns_once_and_leaves_no_file(found, monkeypatch, number, step) -> None:
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    folder = found()
    monkeypatch.setattr(
        *((compile_cache.os, "replace") if step == "replace" else ("builtins.open",)), fail
    )
    with pytest.warns(RuntimeWarning, match=r"NUMBA_CACHE_DIR.*dvkernels compile"):
        compile_cache.write("name", b"body")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_cache.write("name", b"body")
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_an_unreadable_file_counts_as_missing(found, monkeypatch, number) -> None:
    compile_cache.write("name", b"body")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert compile_cache.read("name") is None


def test_a_folder_that_was_deleted_meanwhile_is_made_again(found) -> None:
    shutil.rmtree(found())
    compile_cache.write("name", b"body")
    assert compile_cache.read("name") == b"body"


def test_only_old_folders_are_removed(found, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(compile_cache._config, "CACHE_DIR", str(tmp_path))
    kept, strange = tmp_path / "dvkernels" / f"{9:032x}", tmp_path / "dvkernels" / "of mine"
    aside = tmp_path / "aside"
    for folder in (aside, strange):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    for age in range(40):
        folder = tmp_path / "dvkernels" / f"{age:032x}"
        folder.mkdir(parents=True)
        (folder / "old.code").touch()
        os.utime(folder, (1e9 - age, 1e9 - age))
    (tmp_path / "dvkernels" / ("f" * 32)).symlink_to(aside)
    current = found()
    left = {path.name for path in current.parent.iterdir()}
    assert left == {f"{age:032x}" for age in range(15)} | {current.name, strange.name, "f" * 32}
    assert (aside / "file").exists()
    assert (strange / "file").exists()
    assert (kept / "old.code").exists()


def test_an_edit_of_any_compiled_source_starts_a_new_folder(monkeypatch, tmp_path) -> None:
    shutil.copytree(PACKAGE / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(compile_cache, "_HERE", tmp_path / "kernels")

    def name():
        return compile_cache.digest(*compile_cache._sources())

    seen = {name()}
    files = sorted((tmp_path / "kernels").rglob("*.py"))
    for path in files:
        path.write_text(path.read_text() + "# edited\n")
        is_of_gpus = "cuda" in path.relative_to(tmp_path / "kernels").parts
        assert (name() in seen) == is_of_gpus
        seen.add(name())
    for version in ("__version__",):
        before = compile_cache._versions()
        monkeypatch.setattr(compile_cache.numba, version, "another")
        assert compile_cache._versions() != before


PROGRAM = """
import sys
import numpy as np
sys.stdin.read(1)  # all processes start at once
from dvkernels import kernels
from dvkernels.kernels.cpu.engine import loops
a = [np.ones(5, np.int16), np.ones(5, np.int16)]
print(kernels.reduce(a).sum(), sum(runner.cache_hits for runner in loops._runners.values()))
"""


def test_processes_fill_an_empty_folder_at_once_and_another_compiles_nothing(tmp_path) -> None:
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        child.stdin.write("go")
        child.stdin.flush()
    results = [child.communicate(timeout=100)[0].split()[0] for child in children]
    assert results == ["10", "10"]
    (folder,) = (tmp_path / "dvkernels").iterdir()
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {Path(name).suffix for name in files} == {".code"}
    third = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, input="go", capture_output=True, text=True
    )
    assert third.stdout == "10 1\n", third.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files


LOADED = """
import sys
import numpy as np
from dvkernels import kernels

buffers = [np.ones(4), np.ones(4)]
kernels.all_reduce(buffers)
assert (buffers[0] == 2).all() and "numba" in sys.modules
assert "numba.np.arraymath" not in sys.modules  # which the compiler needs, and imports SciPy

import numba

assert numba.njit(lambda x: x.sum())(buffers[0]) == 8  # a function of the user's has it
assert "numba.np.arraymath" in sys.modules
"""


def test_cached_code_is_loaded_without_what_only_the_compiler_needs() -> None:
    dvkernels.kernels.all_reduce([np.ones(4), np.ones(4)])  # now it is in the cache
    subprocess.run([sys.executable, "-c", LOADED], cwd=PACKAGE.parent, check=True, timeout=100)
