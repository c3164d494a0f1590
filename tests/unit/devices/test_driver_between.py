"""Driver calls for several devices (peer access, memory, events) on a recording double."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest

from dvkernels.devices.driver import Driver
from dvkernels.errors import DeviceError
from dvkernels.kernels.cuda.multi_gpu import peer_access


class RecordingLibrary:
    """Driver library with three devices that records its calls; ``codes``: nonzero results."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.calls, self.current = codes, [], 0
        self.unreachable_pairs: set[tuple[int, int]] = set()
        self.allocations: dict[int, Any] = {}
        self.freed: list[int] = []
        self.copied = b""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*args: Any) -> int:
            self.calls.append(name)
            getattr(self, f"on_{name}", lambda *_: None)(*args)
            return self.codes.get(name, 0)

        return function

    def on_cuDeviceGet(self, found: Any, device: int) -> None:
        found._obj.value = device

    def on_cuDeviceCanAccessPeer(self, found: Any, device: int, peer: int) -> None:
        found._obj.value = (device, peer) not in self.unreachable_pairs

    def on_cuDeviceGetUuid_v2(self, found: Any, device: int) -> None:
        found[:] = [*range(15), device]

    def on_cuDevicePrimaryCtxRetain(self, found: Any, device: int) -> None:
        found._obj.value = 100 + device

    def on_cuCtxSetCurrent(self, context: Any) -> None:
        self.current = getattr(context, "value", context) or 0

    def on_cuCtxGetCurrent(self, found: Any) -> None:
        found._obj.value = self.current or None

    def on_cuCtxEnablePeerAccess(self, context: Any, flags: int) -> None:
        self.opened = (self.current, context.value, flags)

    def _allocate(self, found: Any, size: Any) -> None:
        allocation = ctypes.create_string_buffer(size.value)
        found._obj.value = ctypes.addressof(allocation)
        self.allocations[ctypes.addressof(allocation)] = allocation

    def on_cuMemAlloc_v2(self, found: Any, size: Any) -> None:
        self._allocate(found, size)

    def on_cuMemHostAlloc(self, found: Any, size: Any, flags: int) -> None:
        assert flags == 3
        self._allocate(found, size)

    def on_cuMemFree_v2(self, address: Any) -> None:
        self.freed.append(address.value)

    on_cuMemFreeHost = on_cuMemFree_v2

    def on_cuMemcpyHtoDAsync_v2(self, to: Any, host: Any, size: Any, stream: Any) -> None:
        self.copied = ctypes.string_at(host, size.value)

    def on_cuEventCreate(self, found: Any, flags: int) -> None:
        assert flags == 2
        found._obj.value = 77


@pytest.mark.parametrize(("code", "is_open"), [(0, True), (704, True), (711, False)])
def test_peer_access_counts_only_if_it_can_be_enabled(code: int, is_open: bool) -> None:
    library = RecordingLibrary(cuCtxEnablePeerAccess=code)
    library.unreachable_pairs.add((0, 2))
    library.current = 102  # the thread's context, to be restored
    driver = Driver(library)
    assert driver.open_peer(0, 1) == is_open
    assert library.opened == (100, 101, 0)
    assert library.current == 102
    assert not driver.open_peer(0, 2)
    assert library.calls.count("cuCtxEnablePeerAccess") == 1
    expected = [[True, is_open, False], [is_open, True, is_open], [is_open, is_open, True]]
    assert peer_access.reach(driver, (0, 1, 2)) == expected


def test_words_are_written_and_memory_is_freed() -> None:
    library = RecordingLibrary()
    devices = peer_access.PeerAccess(Driver(library))
    memory = devices.words(1, [1, -2])
    address = memory.address
    assert library.copied == (1).to_bytes(8, "little") + (-2).to_bytes(8, "little", signed=True)
    order = [name for name in library.calls if name.startswith(("cuStream", "cuMemcpy"))]
    assert order == [
        "cuStreamCreate",
        "cuMemcpyHtoDAsync_v2",
        "cuStreamSynchronize",
        "cuStreamDestroy_v2",
    ]
    assert library.freed == []
    del memory
    gc.collect()
    assert library.freed == [address]


def test_pinned_words_are_zero_and_live_as_long_as_their_array() -> None:
    library = RecordingLibrary()
    words = peer_access.PeerAccess(Driver(library)).pinned(1, 5)
    part = words[1:]
    assert words.tolist() == [0] * 5
    del words
    gc.collect()
    assert library.freed == []
    del part
    gc.collect()
    assert library.freed == [*library.allocations]


def test_out_of_memory_is_reported_and_leaks_nothing() -> None:
    library = RecordingLibrary(cuMemcpyHtoDAsync_v2=2)
    with pytest.raises(DeviceError, match="out of memory"):
        peer_access.PeerAccess(Driver(library)).words(0, [1])
    gc.collect()
    assert library.freed == [*library.allocations]
    assert library.calls.count("cuStreamDestroy_v2") == 1
    with pytest.raises(DeviceError, match="out of memory"):
        peer_access.PeerAccess(Driver(RecordingLibrary(cuMemAlloc_v2=2))).empty(0, 8)


def test_an_event_is_destroyed_with_its_last_reference() -> None:
    library = RecordingLibrary()
    devices = peer_access.PeerAccess(Driver(library))
    event = devices.event(0)
    devices.record([(0, 5, event)])
    devices.wait([(1, 6, event)])
    assert "cuEventDestroy_v2" not in library.calls
    del event
    gc.collect()
    assert library.calls.count("cuEventDestroy_v2") == 1
    assert library.calls.index("cuEventRecord") < library.calls.index("cuStreamWaitEvent")


def test_a_kernel_is_loaded_eagerly_where_the_driver_can() -> None:
    library = RecordingLibrary()
    Driver(library).load(0, b"image", "name")
    assert library.calls.index("cuModuleGetFunction") < library.calls.index("cuFuncLoad")


def test_each_device_has_its_own_uuid() -> None:
    driver = Driver(RecordingLibrary())
    assert [driver.uuid(k) for k in (0, 2)] == [
        f"000102030405060708090a0b0c0d0e{k}" for k in ("00", "02")
    ]
