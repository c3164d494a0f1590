"""Each requirement in pyproject.toml has a lowest version, and .ci/run installs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOWEST = ROOT / ".ci" / "lowest.py"


@pytest.mark.skipif(not LOWEST.exists(), reason="needs a checkout")
def test_each_requirement_has_a_lowest_version():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = table["project"]["optional-dependencies"]
    wanted = [*table["project"]["dependencies"], *extras["demo"], *extras["test"]]
    command = [sys.executable, str(LOWEST)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    lowest = dict(line.split("==") for line in shown)
    names = {re.match(r"[\w-]+", text)[0] for text in wanted}
    assert lowest.keys() == names - {"dvkernels"}
    assert lowest["pytest"] == table["tool"]["pytest"]["ini_options"]["minversion"]
