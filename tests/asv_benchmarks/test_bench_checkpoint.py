"""bench-checkpoint measures every case, also with a peer."""

from __future__ import annotations

import json
import sys

import pytest
from peers import main


@pytest.mark.wide
def test_every_case_is_measured(capsys, tmp_path):
    found = tmp_path / "found.json"
    arguments = ["--rounds", "1", "--mebibytes", "2", "--json", str(found)]
    arguments += ["--folder", str(tmp_path), "--peer-python", f"savez={sys.executable}"]
    assert main.main(["bench-checkpoint", *arguments]) == 0
    results = json.loads(found.read_text())["results"]
    assert [(result["case"], result["who"]) for result in results] == [
        ("save", "dvkernels"), ("save", "savez"), ("restore", "dvkernels"), ("restore", "savez"),
        ("step", "dvkernels"), ("step", "during a save"), ("step", "copy to host"),
    ]  # fmt: skip
    assert all(result["seconds_per_call"] > 0 for result in results)
    assert "us per call" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [found]


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--peer-python", "pickle=x"]])
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    assert main.main(["bench-checkpoint", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
