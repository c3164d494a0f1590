"""The tests for GPUs, read without one: none may wait for longer than pytest lets it run."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path for path in HERE.glob("test_*.py") if path != Path(__file__))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_may_take_longer_than_a_hang_is_marked_slow(path):
    """A test that hangs ends pytest, and with it the only run on a GPU for a while."""
    settings = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text("utf-8"))
    limit = settings["tool"]["pytest"]["ini_options"]["faulthandler_timeout"]
    for test in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(test, ast.FunctionDef):
            continue
        marks = " ".join(map(ast.unparse, test.decorator_list))
        seconds = [
            value.value
            for call in ast.walk(test)
            if isinstance(call, ast.Call)
            for value in (*call.args, *(keyword.value for keyword in call.keywords))
            if isinstance(value, ast.Constant) and type(value.value) is int
            if ast.unparse(call.func) in ("subprocess.run", "check_body")
        ]
        assert "slow" in marks or sum(seconds) < limit, f"{test.name} waits for {seconds} s"
