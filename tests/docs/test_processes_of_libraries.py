"""The blocks of the page on host groups for joblib, Ray and Dask, where these are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_code_blocks import ROOT, _code_blocks

PAGE = ROOT / "docs/how-to/processes-of-one-host.md"
PRINTED = "[array([0.5, 0.5, 0.5]), array([0.5, 0.5, 0.5])]\n"


@pytest.mark.wide
@pytest.mark.parametrize("package", ["joblib", "ray", "dask"])
def test_processes_of_other_libraries(package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    start, *others = [block.text for block in _code_blocks(PAGE)]
    (block,) = (
        text for text in others if text.startswith((f"import {package}", f"from {package}"))
    )
    program = tmp_path / "program.py"
    # Dask starts processes that import the program.
    indented = "".join(f"    {line}" for line in block.splitlines(keepends=True))
    program.write_text(f"{start}\n\nif __name__ == '__main__':\n{indented}")
    ran = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith(PRINTED), ran.stdout
