"""Shipped PTX: a first call on a GPU needs no compiler but the driver, or says what it lacks."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.devices import cuda
from dvkernels.errors import DeviceError
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import catalogue, launcher, operations, shipped_ptx

ROOT = Path(__file__).resolve().parents[3]
ADD = catalogue.collective(arithmetic.ADD, arithmetic.type_code(np.dtype("f4")))
OF_USER = catalogue.collective(operations.Custom(None, None), 0)

# A driver in which everything works and nothing happens, two arrays that CuPy could have made, and
# nothing that compiles: importing any of it fails.
FIRST_CALL = """
import ctypes, sys, types

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "numba_cuda", "cuda", "nvidia"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refused())
stream = types.SimpleNamespace(ptr=5)
cupy = sys.modules["cupy"] = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(get_current_stream=lambda device: stream)

import numpy as np

from dvkernels import kernels
from dvkernels.devices import cuda, driver
from dvkernels.kernels.cuda.engine import shipped_ptx

class ndarray:
    def __init__(self, address):
        self.shape, self.dtype, self.strides = (1000,), np.dtype("f4"), (4,)
        self.data = types.SimpleNamespace(ptr=address, device_id=0)
        self.device = types.SimpleNamespace(id=0)

ndarray.__module__ = "cupy"

class Library:
    loaded, launched = [], []

    def __getattr__(self, name):
        return lambda *args: self.answer(name, *args) or 0

    def answer(self, name, *args):
        if name == "cuDeviceGetAttribute":
            args[0]._obj.value = {75: 9, 76: 0, 16: 132}.get(args[1], 0)
        elif name == "cuDriverGetVersion":
            args[0]._obj.value = 12000
        elif name == "cuDeviceGetCount":
            args[0]._obj.value = 1
        elif name == "cuModuleLoadDataEx":
            self.loaded.append(args[1].value)
        elif name == "cuModuleGetFunction":
            self.loaded.append(args[2])
            args[0]._obj.value = 7
        elif name == "cuLaunchKernel":
            self.launched.append(args[0].value)

library = Library()
found = driver.Driver(library)
driver.find = lambda: found
cuda._installed = lambda: ("cupy-cuda12x",)
shipped_ptx.unusable = str  # whether the files are current is another test
kernels.all_reduce([ndarray(1 << 20), ndarray(1 << 21)])
kernels.all_reduce([ndarray(1 << 22), ndarray(1 << 23)])
image, name = library.loaded
sys.stdout.write(f"{name.decode()} {library.launched} {image.decode()}")
"""


def test_a_first_call_hands_the_driver_ptx_and_imports_no_compiler():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    packed = shipped_ptx.path_of(ADD).read_bytes()
    ptx = lzma.decompress(packed).decode()
    assert ended.stdout == f"dvkernels_add_float32 [7, 7] {ptx}"


@pytest.fixture
def current(monkeypatch):
    """The shipped PTX counts as that of the sources, which another test says."""
    monkeypatch.setattr(shipped_ptx, "unusable", str)


def test_a_kernel_whose_sources_were_edited_is_compiled(monkeypatch):
    monkeypatch.setattr(shipped_ptx, "digest", lambda sources: "of other sources")
    monkeypatch.setattr(shipped_ptx, "unusable", shipped_ptx.unusable.__wrapped__)
    assert shipped_ptx.find(ADD, (9, 0)) is None
    assert shipped_ptx.described().startswith("compiled by Numba in each process: kernels whose so")
    monkeypatch.setattr(cuda, "_installed", lambda: ("cupy",))
    message = "'add float32'.*whose sources are not those.*numba-cuda is not installed.*pip install"
    with pytest.raises(DeviceError, match=message):
        launcher._compile(ADD, (9, 0))


def test_older_gpus_and_functions_of_users_have_kernels_compiled_for_them(current):
    assert shipped_ptx.reason(ADD, (7, 0)) == "on a GPU of compute capability 7.0"
    assert shipped_ptx.reason(OF_USER, (9, 0)) == "which calls a function of the user's"
    assert shipped_ptx.find(ADD, (7, 0)) is shipped_ptx.find(OF_USER, (9, 0)) is None
    assert shipped_ptx.find(ADD, (7, 5)) == shipped_ptx.find(ADD, (12, 0))


@pytest.mark.skipif(cuda.is_simulated(), reason="the simulator has its own compiler")
def test_a_custom_reduction_says_that_it_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(cuda, "_installed", lambda: ("cupy",))
    op = dv.CustomReduction(numba.njit(lambda a, b: a + b), 0, "plus")
    with pytest.raises(DeviceError, match=r"CustomReduction 'plus'.*numba-cuda is not installed"):
        operations.resolve(op, np.dtype("f4"))


@pytest.mark.parametrize("content", [None, b"", b"\xfd7zXZ\0damaged"])
def test_a_file_that_is_missing_or_damaged_is_an_error(current, content, monkeypatch, tmp_path):
    monkeypatch.setattr(shipped_ptx, "FOLDER", tmp_path)
    if content is not None:
        shipped_ptx.path_of(ADD).write_bytes(content)
    with pytest.raises(
        DeviceError, match=r"add_float32\.ptx\.xz cannot be read.*install dvkernels"
    ):
        shipped_ptx.find(ADD, (9, 0))


def test_the_kernel_of_a_pair_is_made_once_and_has_a_name_of_its_own():
    kernels = [*catalogue.shipped()]
    assert len({kernel.name for kernel in kernels}) == len({*kernels}) == len(kernels)
    assert {*catalogue.shipped()} == {*kernels}
