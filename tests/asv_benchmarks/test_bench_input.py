"""bench-input measures every case, and reports wrong arguments."""

from __future__ import annotations

import json

import pytest
from peers import input as cases
from peers import main


def test_every_case_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        cases, "CASES", {name: (text, 3) for name, (text, _) in cases.CASES.items()}
    )
    found = tmp_path / "found.json"
    assert main.main(["bench-input", "--rounds", "1", "--json", str(found)]) == 0
    results = json.loads(found.read_text())["results"]
    assert [result["case"] for result in results] == list(cases.CASES)
    assert all(result["seconds_per_batch"] > 0 for result in results)
    assert all(result["times_ours"] == 1 for result in results)
    assert "us per batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--peer-python", "spark=x"], ["--peer-python", "grain"]]
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    assert main.main(["bench-input", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
