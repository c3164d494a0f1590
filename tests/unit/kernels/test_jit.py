"""The decorators of kernels/jit.py: the only ones of the package, in any environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dvkernels
from dvkernels import errors
from dvkernels.kernels import jit
from dvkernels.kernels.cpu import compile_ahead as ahead

PACKAGE = Path(dvkernels.__file__).parent


def _python(program: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_no_other_module_uses_the_decorators_of_numba() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith(("@numba.njit", "@numba.cfunc", "@njit"))
    }
    # Benchmarks may compile functions of their own.
    assert {name for name in users if not name.startswith("benchmarks")} == set()


EVERYTHING = """
import sys
import numba
import numpy as np
import dvkernels as dv
from dvkernels import kernels
from dvkernels.kernels.cpu import group

kernels.all_reduce([np.ones(9), np.ones(9)])
kernels.all_reduce([np.ones(1 << 19), np.ones(1 << 19)])  # with helper threads
kernels.all_reduce_many([[np.ones(9), np.ones(9)]], "max")
weight = [np.zeros(3)]
kernels.cpu.optimizers.sgd([[np.ones(3)]], [weight], learning_rate=0.5)
assert weight[0][0] == -0.5
with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    total = strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.ones(3)))
    assert total.values[1][0] == 2
assert sorted(dv.Dataset.range(40).shuffle(seed=1)) == [*range(40)]
table = dv.Variable(np.zeros((9, 2), np.float16))
table.scatter_add([3, 3], np.ones((2, 2), np.float16))
assert (table.gather_rows([3] * 99_999) == 2).all()
group.barrier(group.Group(1).state, 0)
"""


def test_kernels_are_compiled_where_users_debug_their_own_functions() -> None:
    program = f"""{EVERYTHING}
@numba.njit
def own(x):
    return type(x).__name__  # fails in a compiled function

assert own(1.5) == "float"
larger = dv.CustomReduction(lambda a, b: max(a, b), 0, "larger")
assert kernels.reduce([np.ones(4), np.full(4, 5.0)], larger)[0] == 5
"""
    done = _python(program, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_compiling_ahead_leaves_nothing_to_compile(tmp_path) -> None:
    environ = {"NUMBA_CACHE_DIR": str(tmp_path)}
    ahead = subprocess.run(
        [sys.executable, "-m", "dvkernels", "compile"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ahead.returncode == 0, ahead.stderr
    (folder,) = (tmp_path / "dvkernels").iterdir()
    assert str(folder) in ahead.stdout
    before = {path.name for path in folder.iterdir()}
    assert len(before) > 60
    done = _python(EVERYTHING, **environ)
    assert done.returncode == 0, done.stderr
    train = [sys.executable, "-m", "dvkernels", "train", "--epochs", "1"]
    subprocess.run(train, env={**os.environ, **environ}, capture_output=True, check=True)
    assert {path.name for path in folder.iterdir()} == before


def _compiled_functions():
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("dvkernels.kernels.cpu."):
            for name, value in vars(module).items():
                if isinstance(value, jit._Dispatcher):
                    yield f"{module.__name__}.{name}", value


def test_compiled_functions_that_read_python_objects_keep_the_gil() -> None:
    assert ahead.compile_all  # so every module is loaded
    readers = [
        (name, function)
        for name, function in _compiled_functions()
        if {"read_addresses", "item_of", "length_of"} & {*function.py_func.__code__.co_names}
    ]
    assert len(readers) >= 4
    assert [name for name, function in readers if function.targetoptions.get("nogil")] == []


def test_the_digest_of_the_cache_covers_all_sources_of_compiled_functions() -> None:
    strangers = [
        f"{name}: {used}"
        for name, function in _compiled_functions()
        for used in function.py_func.__code__.co_names
        if (value := function.py_func.__globals__.get(used)) is not None
        if (home := getattr(value, "__module__", getattr(value, "__name__", ""))) is not None
        if home.startswith("dvkernels.") and not home.startswith("dvkernels.kernels.")
        if not (isinstance(value, type) and issubclass(value, errors.DvKernelsError))
    ]
    assert strangers == []
