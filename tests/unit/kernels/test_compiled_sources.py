"""Numba's cache sees edits of a function's own file only: others are named by their digest."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest

import dvkernels

CPU = Path(dvkernels.__file__).parent / "kernels" / "cpu"
COMPILED = sorted(
    path.stem
    for path in CPU.glob("*.py")
    if any(mark in path.read_text() for mark in ("numba.njit", "numba.cfunc"))
)


def neighbours(tree):
    """The files of this folder that a module imports, and those above it that emit code."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "dvkernels.kernels.cpu":
            yield from (CPU / f"{alias.name}.py" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "dvkernels.kernels":
            paths = (CPU.parent / f"{alias.name}.py" for alias in node.names)
            yield from (path for path in paths if "llvmlite" in path.read_text())


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_file_names_the_digests_of_its_neighbours(name):
    tree = ast.parse((CPU / f"{name}.py").read_text())
    expected = {
        path.stem.upper(): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in neighbours(tree)
    }
    found = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in expected
        and isinstance(node.value, ast.Constant)
    }
    assert found == expected, "run: python .ci/digests.py"
