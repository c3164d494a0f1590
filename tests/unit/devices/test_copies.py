"""``Driver.copy_each`` on a driver double: addresses, context and errors."""

from __future__ import annotations

import pytest
from driver_double import DriverLibrary

from dvkernels.devices.driver import Driver
from dvkernels.errors import DeviceError


class RecordingLibrary(DriverLibrary):
    """Driver library that records copies."""

    def __init__(self, codes=()):
        super().__init__()
        self.copies, self.codes = [], iter(codes)

    def cuMemcpyAsync(self, target, source, nbytes, stream):
        self.copies.append((target.value, source.value, nbytes.value, stream.value))
        return next(self.codes, 0)


def test_addresses_keep_64_bits_and_the_context_is_restored():
    library = RecordingLibrary()
    library.current = 1
    far = 0x7F12_3456_789A
    Driver(library).copy_each(0, far, [far + 1, 2], [3, far + 4], [5, 1 << 33])
    assert library.copies == [(far + 1, 3, 5, far), (2, far + 4, 1 << 33, far)]
    assert library.current == 1


def test_a_failure_is_raised_after_all_copies_are_enqueued():
    library = RecordingLibrary(codes=[0, 700, 0])
    with pytest.raises(DeviceError, match="cuMemcpyAsync"):
        Driver(library).copy_each(0, 0, [1, 2, 3], [4, 5, 6], [7, 8, 9])
    assert len(library.copies) == 3
