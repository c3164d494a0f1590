"""Streams of other libraries in CuPy: the installed one, and doubles of CuPy 13 and 14."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest

from dvkernels.devices import cuda


def array_library(monkeypatch, cupy):
    """Return the array library of CuPy, imported anew over a double."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    name = "dvkernels.devices.cupy_arrays"
    spec = importlib.util.spec_from_file_location(name, importlib.util.find_spec(name).origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CuPyArrays()


def cupy_with(stream_class, **more):
    return types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=stream_class, **more))


def test_cupy_14_takes_a_stream_by_the_protocol(monkeypatch):
    class Stream:
        @classmethod
        def from_external(cls, stream):
            return "by the protocol", stream.__cuda_stream__()

    def deprecated(*_):
        raise DeprecationWarning("ExternalStream is deprecated")

    library = array_library(monkeypatch, cupy_with(Stream, ExternalStream=deprecated))
    assert library.stream_at(1, 1234) == ("by the protocol", (0, 1234))


def test_cupy_13_takes_a_stream_by_its_address(monkeypatch):
    external = lambda address, device: ("by its address", address, device)  # noqa: E731
    library = array_library(monkeypatch, cupy_with(object, ExternalStream=external))
    assert library.stream_at(1, 1234) == ("by its address", 1234, 1)


@pytest.mark.skipif(cuda.is_simulated(), reason="is of the installed CuPy")
@pytest.mark.parametrize("address", [0, 1, 1234])
def test_the_installed_cupy_takes_a_stream_without_a_warning(monkeypatch, address):
    library = array_library(monkeypatch, pytest.importorskip("cupy"))
    assert library.stream_at(0, address).ptr == address
