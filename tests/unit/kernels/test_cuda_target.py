"""Import of numba-cuda beside a NumPy that it does not know, and parts of the toolkit missing."""

from __future__ import annotations

import importlib
import threading
import warnings

import numpy as np
import pytest

from dvkernels.errors import DeviceError, UnsupportedDTypeError
from dvkernels.kernels.cuda.engine import compiler, cuda_target, operations


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a module, to be loaded beside a NumPy without row_stack."""
    monkeypatch.delattr(np, "row_stack", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    serial = iter(range(100))

    def write_module(program):
        name = f"{tmp_path.name}_{next(serial)}"
        (tmp_path / f"{name}.py").write_text(program)
        importlib.invalidate_caches()
        return name

    return write_module


def test_removed_names_are_there_while_a_module_loads_and_not_after(write):
    module = cuda_target.load(write("import numpy\nfound = numpy.row_stack"))
    assert module.found is np.vstack
    assert not hasattr(np, "row_stack")


def test_a_module_that_does_not_load_is_an_error_with_a_remedy(write):
    name = write("import numpy\nnumpy.row_stack, numpy.removed_as_well")
    with pytest.raises(DeviceError, match=r"NumPy 2.*removed_as_well.*pip install 'numpy<2.5'"):
        cuda_target.load(name)
    assert not hasattr(np, "row_stack")
    with pytest.raises(ModuleNotFoundError):  # an older numba-cuda: nothing is wrong
        cuda_target.load("numba_without_it")


def test_threads_that_load_at_once_all_find_the_names(write):
    names = [write("import numpy, time\ntime.sleep(1e-3)\nfound = numpy.row_stack") for _ in "1234"]
    found = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(cuda_target.load(name).found))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [np.vstack] * len(names)
    assert not hasattr(np, "row_stack")


def test_the_one_warning_of_its_import_is_silent_and_others_are_not(write):
    program = "import warnings\nwarnings.warn({!r}, DeprecationWarning)"
    before = list(warnings.filters)
    cuda_target.load(write(program.format("The 'generic' unit for NumPy timedelta is deprecated")))
    with pytest.raises(DeviceError, match="something else"):
        cuda_target.load(write(program.format("something else")))
    assert warnings.filters == before


class DynamicLibNotFoundError(RuntimeError):
    """Twin of the error of cuda.pathfinder, by name."""


def test_a_missing_part_of_the_toolkit_is_named_with_the_remedy(monkeypatch):
    def compile_ptx(*args, **options):
        raise DynamicLibNotFoundError('Failure finding "libnvrtc.so.13": No such file\nmore')

    monkeypatch.setattr(cuda_target, "cuda", type("", (), {"compile_ptx": compile_ptx}))
    message = r"libnvrtc.so.13.*pip install 'dvkernels\[cuda13\]'.*CUDA_HOME"
    with pytest.raises(DeviceError, match=message):
        cuda_target.compile_ptx(None, None)


def test_other_errors_of_the_compiler_stay_what_they_are(monkeypatch):
    def compile_ptx(*args, **options):
        raise TypeError("no such operation")

    monkeypatch.setattr(cuda_target, "cuda", type("", (), {"compile_ptx": compile_ptx}))
    with pytest.raises(TypeError, match="no such operation"):
        cuda_target.compile_ptx(None, None)


@pytest.mark.parametrize("error", [DeviceError("a part is missing"), TypeError("unknown")])
def test_a_custom_reduction_is_not_blamed_for_a_missing_part(monkeypatch, error):
    import numba

    import dvkernels as dv

    def check(*args):
        raise error

    monkeypatch.setattr(operations.devices, "is_simulated", lambda: False)
    monkeypatch.setattr(operations.devices, "_installed", lambda: ("numba-cuda",))
    monkeypatch.setattr(compiler, "check", check)
    op = dv.CustomReduction(numba.njit(lambda a, b: a + b), 0, "plus")
    expected = DeviceError if isinstance(error, DeviceError) else UnsupportedDTypeError
    with pytest.raises(expected, match=str(error)):
        operations.resolve(op, np.dtype("f4"))
