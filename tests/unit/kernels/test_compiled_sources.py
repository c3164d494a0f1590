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
    """The files of this folder that a module imports."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "dvkernels.kernels.cpu":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_file_names_the_digests_of_its_neighbours(name):
    tree = ast.parse((CPU / f"{name}.py").read_text())
    expected = {
        neighbour.upper(): hashlib.sha256((CPU / f"{neighbour}.py").read_bytes()).hexdigest()[:8]
        for neighbour in neighbours(tree)
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
