"""Contexts, streams and threads of driver calls, on a double that knows the owner of a stream."""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest
from driver_double import DEFAULT_STREAMS, DriverLibrary

from dvkernels import errors
from dvkernels.communicators.nccl import watchdog
from dvkernels.devices import array_memory, cuda, cuda_arrays, driver
from dvkernels.devices.device import Device
from dvkernels.devices.driver import Driver
from dvkernels.devices.stream_order import DeviceStream
from dvkernels.kernels.cuda.multi_gpu.peer_access import PeerAccess


@pytest.fixture
def library(monkeypatch):
    made = DriverLibrary()
    found = Driver(made)
    monkeypatch.setattr(driver, "find", lambda: found)
    return made


def handles(library):
    return [
        (device, handle)
        for device in range(2)
        for handle in (*DEFAULT_STREAMS, library.stream(device))
    ]


@pytest.mark.parametrize("current", [None, 0, 1])
def test_a_stream_waits_for_any_other_whichever_context_is_current(library, current):
    streams = handles(library)
    library.current = current
    for waiting, awaited in itertools.permutations(streams, 2):
        library.past.clear()
        library.work(*awaited, "awaited")
        cuda_arrays.order_streams([(DeviceStream(*waiting), DeviceStream(*awaited))])
        assert library.work(*waiting, "waits") == {"awaited"}
        assert [place for place in streams if library.past.get(place)] == sorted(
            [waiting, awaited]
        ), "no other stream waits"
    assert library.current == current
    assert library.events == {}, "every event is destroyed"


def test_failures_leak_no_event_and_restore_the_context(library):
    library.current = 1
    for pair in [(0, 0, 0, 7), (0, 7, 1, 0), (0, 7, 0, 0)]:  # there is no stream 7
        first, second = DeviceStream(*pair[:2]), DeviceStream(*pair[2:])
        with pytest.raises(errors.DeviceError, match="CUDA_ERROR_400"):
            cuda_arrays.order_streams([(first, second)])
    assert library.events == {}
    assert library.current == 1


@pytest.mark.parametrize("current", [None, 0, 1])
def test_every_call_works_from_any_context_and_restores_it(library, current):
    found = driver.find()
    address = found.allocate(1, 8)
    library.current = current
    assert found.device_of(address) == 1
    assert found.is_open(address)
    found.load(1, b"image", "name")
    found.write(1, address, address, 8)
    found.copy_each(1, 0, [address], [address], [8])
    found.launch(1, 5, 1, 256, driver.Arguments(1), 0)
    assert not found.is_capturing(1, 0)
    assert found.open_peer(0, 1)
    found.synchronize(1)
    found.free(1, address)
    found.free_on_host(1, found.allocate_on_host(1, 8))
    assert library.current == current
    assert library.launched == [(1, 0)]
    assert library.memory == {}


def test_finalizers_run_in_threads_without_a_context(library):
    devices = PeerAccess(driver.find())
    owned = [devices.event(1), devices.words(1, [1, 2]), devices.pinned(1, 3)]

    def collect():
        owned.clear()
        gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join()
    assert (library.events, library.memory) == ({}, {})
    assert {device for name, device in library.calls if "Host" in name} == {1}, (
        "no context is made on a device that the group does not use"
    )


def test_finalizers_of_a_forked_child_leave_the_driver_alone(library, monkeypatch):
    devices = PeerAccess(driver.find())
    owned = [devices.event(1), devices.words(1, [1, 2]), devices.pinned(1, 3)]
    library.calls.clear()
    monkeypatch.setattr(driver.os, "getpid", lambda: 1)
    owned.clear()
    gc.collect()
    assert library.calls == []


def test_a_copy_to_another_gpu_reads_after_and_before_the_work_of_the_source(library, monkeypatch):
    streams = {device: library.stream(device) for device in range(2)}

    class Arrays:
        """Array library whose copies are work of the target's current stream."""

        def empty(self, device, shape, dtype):
            return SimpleNamespace(device=device, shape=shape, dtype=dtype)

        def device_of(self, array):
            return array.device

        def current(self, device):
            return SimpleNamespace(ptr=streams[device])

        def copy(self, target, source):
            self.before = library.work(target.device, streams[target.device], "copy")

    arrays = Arrays()
    monkeypatch.setattr(cuda, "arrays", lambda: arrays)
    content = arrays.empty(0, (3,), "f4")
    library.work(0, streams[0], "made")
    array_memory._Gpu().new(content, Device("cuda", 1))
    assert arrays.before == {"made"}
    assert "copy" in library.work(0, streams[0], "overwritten")


def test_results_of_numba_are_on_the_stream_of_the_work_and_the_host_does_not_wait(monkeypatch):
    made = []

    class OfCuPy:
        """CuPy's array: its interface names the current stream, whatever the work is on."""

        __cuda_array_interface__: ClassVar = {"data": (8, False), "version": 2, "stream": 1}

    class Gpus:
        def __getitem__(self, device):
            return contextlib.nullcontext(made.append(device))

    numba_cuda = SimpleNamespace(
        gpus=Gpus(),
        as_cuda_array=lambda array, sync=True: made.append((array, sync)) or "a Numba array",
    )
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(cuda=numba_cuda))
    for stream, named in [(7, 7), (0, 1), (2, 2)]:
        made.clear()
        result = OfCuPy()
        assert cuda.as_numba(result, 1, stream) == "a Numba array"
        device, (array, sync) = made
        assert (device, sync) == (1, False)
        assert array.__cuda_array_interface__ == {"data": (8, False), "version": 3, "stream": named}
        assert result in vars(array).values(), "the memory stays"


def test_the_watchdog_of_nccl_leaves_captures_of_other_threads_alone(library):
    library.captured, polled = {(0, 7)}, threading.Event()

    class Pending:
        """CuPy's event: asking whether it has happened is a call that captures forbid."""

        @property
        def done(self):
            library.current = 0
            polled.set()
            return library.cuEventQuery(None) == 0

    guard = SimpleNamespace(check=lambda seconds: None, end=lambda error: None)
    with watchdog.Watchdog(60, 1).watch("a call", guard) as events:
        events.append(Pending())
    assert polled.wait(60)
    assert not library.is_invalidated
