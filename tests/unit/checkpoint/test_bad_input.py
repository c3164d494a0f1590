"""Bad input: a CheckpointError that names the fault, within seconds, and nothing written."""

from __future__ import annotations

import os

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import CheckpointError


class Unprintable(Exception):
    def __str__(self):
        raise ZeroDivisionError

    add_note = None


class Unshown:
    def __repr__(self):
        raise ZeroDivisionError


def ascii_or_type(value):
    return ascii(value) if isinstance(value, str) else type(value).__name__


VERBS = {
    "save": lambda path: dv.Checkpoint(x=1).save(path),
    "background": lambda path: dv.Checkpoint(x=1).save(path, background=True),
    "restore": lambda path: dv.Checkpoint(x=1).restore(path),
    "manager": lambda path: dv.CheckpointManager(dv.Checkpoint(x=1), path).save(1),
    "restore_latest": lambda path: dv.CheckpointManager(dv.Checkpoint(x=1), path).restore_latest(),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name", ["a\0b", "\ud800", "a\ud800b/c", 5, None, 2.5, ["a"], Unshown()], ids=ascii_or_type
)
def test_invalid_paths(verb, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        VERBS[verb](name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["save", "restore", "manager"])
@pytest.mark.parametrize(
    "name", ["x" * 300, "file/run", "/", "/proc/run", "a/" * 3000 + "run"], ids=range(5)
)
def test_paths_where_no_folder_can_be(verb, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        VERBS[verb](name)
    assert "file" in os.listdir(tmp_path)


@pytest.mark.parametrize("verb", ["save", "restore", "manager"])
def test_a_removed_working_directory(verb, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(CheckpointError, match="absolute path"):
        VERBS[verb]("run")


def test_bytes_and_names_that_are_not_text_are_valid_paths(tmp_path):
    for path in (os.fsencode(tmp_path / "one"), tmp_path / os.fsdecode(b"two\xff")):
        dv.Checkpoint(x=1).save(path)
        dv.Checkpoint(x=1).restore(path)


def circle():
    ring = [1]
    ring.append({"again": ring})
    return ring


def circle_of_containers():
    ring = [np.zeros(1)]
    ring.append(ring)
    return ring


def deep():
    value = 1
    for _ in range(5000):
        value = [value]
    return value


def shared(bottom, levels):
    for _ in range(levels):
        bottom = [bottom, bottom]
    return bottom


class State:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


VALUES = {
    "huge": (lambda: 10**5000, "as bytes"),
    "huge below": (lambda: {"a": [-(10**5000)]}, "as bytes"),
    "huge key": (lambda: {10**5000: 1}, "as bytes"),
    "unshown": (Unshown, "expected variables"),
    "unshown below": (lambda: {"a": (1, Unshown())}, "x/a/1: expected"),
    "circle": (circle, "x/1/again: it is the list at x again"),
    "circle of containers": (circle_of_containers, "x/1: it is the list at x again"),
    "deep": (deep, "nested deeper"),
    "shared": (lambda: shared([], 60), "place"),
    "shared tuples": (lambda: shared((Unshown(),), 60), "place"),
    "shared containers": (lambda: shared(np.zeros(1), 60), "places"),
    "a state with a cycle": (lambda: State(circle()), "x: a list in it contains itself"),
    "a state that is shared": (lambda: State(shared([], 60)), "place"),
    "a state that is huge": (lambda: State(10**5000), "as bytes"),
    "a state that is unshown": (lambda: State(Unshown()), "expected arrays"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_cannot_be_saved(name, tmp_path):
    make, words = VALUES[name]
    with pytest.raises(CheckpointError, match=words):
        dv.Checkpoint(x=make()).save(tmp_path / "run")
    if not isinstance(make(), State):
        with pytest.raises(CheckpointError):
            dv.Checkpoint(x=1).save(tmp_path / "run", metadata={"x": make()})
    assert os.listdir(tmp_path) == []
    dv.Checkpoint(x=np.zeros(2)).save(tmp_path / "run")
    with pytest.raises(CheckpointError):  # the message shows the target of the restore, too
        dv.Checkpoint(x=make()).restore(tmp_path / "run")


@pytest.mark.parametrize("metadata", [5, [1], "x", 10**5000, Unshown()], ids=ascii_or_type)
def test_metadata_is_a_dict(tmp_path, metadata):
    with pytest.raises(CheckpointError, match="metadata: expected a dict"):
        dv.Checkpoint(x=1).save(tmp_path / "run", metadata=metadata)


def test_shared_data_is_restored_at_each_occurrence(tmp_path):
    array = np.arange(3.0)
    state = State({"first": array, "again": [array, array]})
    dv.Checkpoint(x=shared([1], 12), state=state).save(tmp_path / "run")
    found = {"x": [], "state": State({})}
    dv.Checkpoint(**found).restore(tmp_path / "run")
    assert found["x"] == shared([1], 12)
    assert found["state"].state["again"][1].tolist() == [0, 1, 2]


# -- exceptions of the user ----------------------------------------------------------------------


class Failing(State):
    error: BaseException = Unprintable()

    def load_state_dict(self, state):
        if state:
            raise self.error
        self.state = state


def test_an_error_of_load_state_dict_that_cannot_be_printed(tmp_path, capsys):
    checkpoint = dv.Checkpoint(x=Failing({"a": 1}), data={"number": 1})
    checkpoint.save(tmp_path / "run")
    checkpoint.objects["data"]["number"] = 2
    with pytest.raises(CheckpointError, match=r"x: .* cannot be loaded: Unprintable") as raised:
        checkpoint.restore(tmp_path / "run")
    assert isinstance(raised.value.__cause__, Unprintable)
    assert checkpoint.objects["data"] == {"number": 2}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, ZeroDivisionError])
def test_after_any_error_all_objects_are_unchanged(tmp_path, kind):
    def build(number):
        return {
            "first": State({"a": number}), "list": [number], "dict": {"a": number, str(number): 1},
            "nest": [np.full(2, number), number], "pair": (number, np.full(2, number)),
            "rng": np.random.Generator(np.random.MT19937(number)), "weight": dv.Variable(number),
            "last": Failing({"a": number}),
        }  # fmt: skip

    def content(objects):
        rng = objects["rng"].bit_generator.state
        return repr([objects["first"].state, *map(objects.get, ("list", "dict", "nest", "pair")),
                     rng, objects["weight"].numpy(), objects["last"].state])  # fmt: skip

    dv.Checkpoint(**build(1)).save(tmp_path / "run")
    checkpoint = dv.Checkpoint(**build(2))
    checkpoint.objects["last"].error = kind()
    before = content(checkpoint.objects)
    nest = checkpoint.objects["nest"]
    with pytest.raises((kind, CheckpointError)):
        checkpoint.restore(tmp_path / "run")
    assert content(checkpoint.objects) == before
    assert checkpoint.objects["nest"] is nest


def test_errors_in_state_dict_are_raised_unchanged(tmp_path):
    class Odd(State):
        def state_dict(self):
            raise Unprintable

    for background in (False, True):
        with pytest.raises(Unprintable):
            dv.Checkpoint(x=Odd(1)).save(tmp_path / "run", background=background)
    assert os.listdir(tmp_path) == []
