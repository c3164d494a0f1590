"""Copies on a device, all of them or none: what the driver is asked, on a double."""

from __future__ import annotations

import pytest

from dvkernels.devices.driver import Driver
from dvkernels.errors import DeviceError


class Library:
    """Notes copies; anything else succeeds."""

    def __init__(self, codes=()):
        self.copies, self.codes, self.current = [], iter(codes), []

    def __getattr__(self, name):
        return lambda *args: 0

    def cuCtxSetCurrent(self, context):
        self.current.append(context)
        return 0

    def cuMemcpyAsync(self, target, source, nbytes, stream):
        self.copies.append((target.value, source.value, nbytes.value, stream.value))
        return next(self.codes, 0)


def test_addresses_keep_all_their_bits_and_the_context_comes_back():
    library = Library()
    far = 0x7F12_3456_789A
    Driver(library).copy_each(0, far, [far + 1, 2], [3, far + 4], [5, 1 << 33])
    assert library.copies == [(far + 1, 3, 5, far), (2, far + 4, 1 << 33, far)]
    assert len(library.current) == 2


def test_a_failure_is_raised_when_all_have_been_asked():
    library = Library(codes=[0, 700, 0])
    with pytest.raises(DeviceError, match="cuMemcpyAsync"):
        Driver(library).copy_each(0, 0, [1, 2, 3], [4, 5, 6], [7, 8, 9])
    assert len(library.copies) == 3
