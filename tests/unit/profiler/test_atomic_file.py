"""Result files are written atomically, and symbolic links are not followed."""

from __future__ import annotations

import json
import os

import pytest

import dvkernels as dv
from dvkernels.profiler import atomic_file
from dvkernels.profiler.atomic_file import AtomicFile


def trace(path):
    with dv.profiler.trace(path):
        pass


def put(path):
    atomic_file.write_text(path, "[]")


@pytest.mark.parametrize("write", [trace, put])
@pytest.mark.parametrize("what", ["nothing", "a file", "a link", "a link to nothing"])
def test_an_existing_file_is_replaced_and_links_are_not_followed(tmp_path, write, what):
    precious, path = tmp_path / "precious", tmp_path / "folder" / "run.json"
    path.parent.mkdir()
    precious.write_text("keep")
    match what:
        case "a file":
            path.write_text("old")
        case "a link":
            path.symlink_to(precious)
        case "a link to nothing":
            path.symlink_to(tmp_path / "absent")
    write(path)
    json.loads(path.read_text())
    assert not path.is_symlink()
    assert os.listdir(path.parent) == ["run.json"]
    assert precious.read_text() == "keep"
    assert sorted(os.listdir(tmp_path)) == ["folder", "precious"]


def test_the_temporary_name_cannot_be_predicted(tmp_path):
    names = set()
    for _ in range(3):
        made = AtomicFile(tmp_path / "run.json")
        names |= set(os.listdir(tmp_path))
        made.discard()
        made.discard()
        assert os.listdir(tmp_path) == []
    assert len(names) == 3


def test_an_exchanged_folder_receives_no_file(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    made = AtomicFile(tmp_path / "own" / "run.json")
    (tmp_path / "own").rename(tmp_path / "moved")
    (tmp_path / "own").symlink_to("other")
    made.fill(lambda file: file.write(b"[]"))
    assert os.listdir(tmp_path / "other") == []
    assert os.listdir(tmp_path / "moved") == ["run.json"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        AtomicFile(path).fill(fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "absent/run.json", "x" * 300, "."])
def test_an_impossible_path_raises_in_the_constructor(tmp_path, name):
    with pytest.raises(OSError):  # noqa: PT011 - each system has its own words
        dv.profiler.trace(tmp_path / name)
    with dv.profiler.trace(tmp_path / "good.json"):
        pass


def test_a_pipe_is_written_to():
    read, write = os.pipe()
    atomic_file.write_text(f"/dev/fd/{write}", "[]")
    assert os.read(read, 10) == b"[]"
    os.close(read)
    os.close(write)
