"""Messages: arrays beside the pickle, errors that can be sent, and code with the names of files."""

from __future__ import annotations

import gc
import linecache
import re
import threading
import traceback
import types

import ml_dtypes  # noqa: F401  # names bfloat16
import numpy as np
import pytest

from dvkernels import pickling

WITHOUT_BUFFER = ["bfloat16", "datetime64[s]", "timedelta64[ms]"]  # NumPy copies them
RECORD = np.dtype([("a", "i2"), ("b", "f8")], align=True)
DTYPES = ["?", "i1", ">i4", "u8", "f2", ">f8", "c16", "U3", "S2", "V5", RECORD, *WITHOUT_BUFFER]
LAYOUTS = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "transposed": lambda a: a.T,
    "strided": lambda a: a[::2, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[0], a.shape),
    "empty": lambda a: a[:0],
    "scalar": lambda a: a[0, 0, ...].copy(),
}


def through(value, min_nbytes=0, **how):
    message = bytearray(b"".join(pickling.encode(value, 7, min_nbytes)))
    assert pickling.number_of(memoryview(message)) == 7
    return pickling.decode(memoryview(message), **how), np.frombuffer(message, np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("min_nbytes", [0, 1 << 20], ids=["beside", "inside"])
@pytest.mark.parametrize("is_writeable", [True, False], ids=["writeable", "read-only"])
def test_arrays_come_as_they_are(layout, min_nbytes, is_writeable):
    bits = np.random.default_rng(3).integers(0, 2, 24 * 40, np.uint8)
    for dtype in map(np.dtype, DTYPES):
        whole = np.frombuffer(bits[: 24 * dtype.itemsize].copy(), dtype).reshape(4, 6)
        array = LAYOUTS[layout](whole)
        if layout != "broadcast":
            array.flags.writeable = is_writeable
        (_, found), message = through([b"x", array], min_nbytes)
        assert found.shape == array.shape
        assert (found == array).all()
        if array.flags.forc and array.size:
            assert found.dtype == dtype
            assert found.flags.fnc == array.flags.fnc
            if dtype.name not in WITHOUT_BUFFER:
                assert found.flags.writeable == is_writeable
                assert np.shares_memory(found, message) == (min_nbytes == 0)
                assert min_nbytes or (found.ctypes.data - message.ctypes.data) % 64 == 0


def test_an_array_that_is_used_twice_is_sent_once():
    array = np.arange(1000.0)
    (one, [other], view), message = through((array, [array], array[:5]))
    assert one is other
    assert array.nbytes < message.nbytes < array.nbytes + 1000
    one[0] = 9
    assert other[0] == 9
    assert view[0] == 0


@pytest.mark.parametrize("nbytes", [4095, 4096])
def test_small_arrays_stay_in_the_pickle(nbytes):
    pieces = pickling.encode(np.zeros(nbytes, np.uint8), 0, 4096)
    assert len(pieces) == (4 if nbytes < 4096 else 6)


def test_a_message_in_a_cycle_can_be_collected():
    cycle = pickling.encode("abc", 0, 0)
    cycle.append(cycle)
    del cycle
    gc.collect()  # crashes some Pythons if the message is the buffer of a BytesIO


def test_references_stand_for_objects():
    lock, kept = threading.Lock(), []

    def reference_of(each):
        return "the lock" if each is lock else None

    parts = pickling.encode({"deep": [lambda: lock]}, 0, 0, reference_of)
    found = pickling.decode(memoryview(b"".join(parts)), lambda it: kept.append(it) or lock)
    assert found["deep"][0]() is lock
    assert kept == ["the lock"]


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Holder(Exception):
    """One that cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Raiser(Exception):
    """One whose unpickling raises."""

    def __setstate__(self, state):
        raise state["what"]


class Another(Exception):
    """One that comes as another class."""

    def __reduce__(self):
        return ValueError, ("other",)


class Mute(TwoArguments):
    def __str__(self):
        raise RuntimeError


def raiser(what):
    made = Raiser("text")
    made.what = what
    return made


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TwoArguments("one", 2), "TwoArguments: one"),
        (Holder("held"), "Holder: held"),
        (raiser(ValueError()), "Raiser: text"),
        (raiser(SystemExit(3)), "Raiser: text"),
        (Another("this"), "Another: this"),
        (Mute(1, 2), "Mute"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_an_error_that_cannot_be_sent_has_another_with_its_text(error, text):
    error.add_note("of the user")
    error.add_note("Traceback: line 3")
    assert not pickling.can_be_sent(error)
    sent, _ = through(pickling.sendable(error))
    assert type(sent) is RuntimeError
    assert str(sent) == f"{text} (an error that cannot be sent)"
    assert sent.__notes__ == ["Traceback: line 3"]


def test_an_error_that_can_be_sent_stays_as_it_is():
    class Local(KeyError):
        pass

    for error in (ValueError("a"), Local(np.ones(9)), ExceptionGroup("all", [OSError(2, "b")])):
        assert pickling.sendable(error) is error
        error.add_note("note")
        sent, _ = through(error)
        assert (type(sent), repr(sent), sent.__notes__) == (type(error), repr(error), ["note"])
    assert not hasattr(pickling.sendable(TwoArguments(1, 2)), "__notes__")


SOURCE = """
def outer(k):
    def inner(k):
        return 1 / k  # of inner
    return inner(k)  # of outer
"""


@pytest.mark.parametrize("place", ["main", "cell"])
def test_tracebacks_of_sent_functions_show_their_lines(place, tmp_path):
    file = str(tmp_path / f"{place}.py")
    module = types.ModuleType("__main__")
    exec(compile(SOURCE, file, "exec"), vars(module))
    if place == "main":
        (tmp_path / "main.py").write_text(SOURCE)
    else:
        linecache.cache[file] = (len(SOURCE), None, SOURCE.splitlines(keepends=True), file)
    parts = pickling.encode(module.outer, 0, 0)
    linecache.clearcache()  # as in another process
    found = pickling.decode(memoryview(b"".join(parts)))
    with pytest.raises(ZeroDivisionError) as caught:
        found(0)
    text = "".join(traceback.format_exception(caught.value))
    shown = re.findall(rf'File "{re.escape(file)}", line (\d+), in (\w+)\n +(.*)', text)
    assert shown == [
        ("5", "outer", "return inner(k)  # of outer"),
        ("4", "inner", "return 1 / k  # of inner"),
    ]
