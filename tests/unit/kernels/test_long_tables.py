"""Long launch tables, over a double of the array library."""

from __future__ import annotations

import contextlib
import ctypes
import types

import numpy as np
import pytest

from dvkernels.errors import DeviceError
from dvkernels.kernels.cuda.engine import launcher


class Copies:
    """Double of the array library that counts copies and waits; its GPU memory is host memory."""

    def __init__(self):
        self.made, self.awaited, self.is_capturing = 0, 0, False
        self.ptr, self.waiting = 77, []

    def stream_at(self, device, address):
        return address

    def at(self, device, stream):
        return contextlib.nullcontext()

    def pinned(self, nbytes):
        return np.zeros(nbytes, np.uint8)

    def empty(self, device, shape, dtype):
        self.made += 1
        memory = np.zeros(shape, dtype)
        return types.SimpleNamespace(data=types.SimpleNamespace(ptr=memory.ctypes.data, of=memory))

    def copy(self, target, source, stream):
        target.data.of[:] = source

    def event(self, device):
        return self

    def record(self, stream):
        pass

    def synchronize(self):
        self.awaited += 1


@pytest.fixture
def copies(monkeypatch):
    double = Copies()
    driver = types.SimpleNamespace(
        is_capturing=lambda device, stream: double.is_capturing, wait_for=double.waiting.extend
    )
    monkeypatch.setattr(launcher, "_driver", lambda: driver)
    monkeypatch.setattr(launcher.devices, "arrays", lambda: double)
    return double


def words_at(address, count):
    return list((ctypes.c_int64 * count).from_address(address))


def test_equal_tables_are_copied_once_per_stream(copies):
    tables = launcher.LongTables()
    words = [*range(200), -1]
    address = tables.place(0, 5, words)
    assert words_at(address, 201) == words
    assert copies.waiting == []
    assert tables.place(0, 5, words) == address
    # Another stream may have the handle by now: it waits for the copy.
    assert (copies.made, copies.waiting) == (1, [(0, 5, 77)])
    assert tables.place(0, 6, words) != address
    assert tables.place(0, 5, [*words[:-1], 7]) != address
    assert copies.made == 3


def test_the_least_recently_used_tables_are_evicted_after_their_copies(copies, monkeypatch):
    monkeypatch.setattr(launcher.LongTables, "_MAX_KEPT", 2)
    tables = launcher.LongTables()
    for k in (1, 2, 1, 3, 1):
        tables.place(0, 5, [k] * 200)
    assert (copies.made, copies.awaited) == (3, 1)  # 2 was evicted; 1 was used since
    tables.place(0, 5, [2] * 200)
    assert copies.made == 4


def test_tables_of_a_captured_graph_stay(copies, monkeypatch):
    monkeypatch.setattr(launcher.LongTables, "_MAX_KEPT", 1)
    tables = launcher.LongTables()
    copies.is_capturing = True
    with pytest.raises(DeviceError, match="once on the stream, before"):
        tables.place(0, 5, [1] * 200)
    copies.is_capturing = False
    address = tables.place(0, 5, [1] * 200)
    copies.is_capturing = True
    assert tables.place(0, 5, [1] * 200) == address
    copies.is_capturing = False
    for k in range(2, 6):
        tables.place(0, 5, [k] * 200)
    assert words_at(tables.place(0, 5, [1] * 200), 2) == [1, 1]
    assert copies.made == 5
