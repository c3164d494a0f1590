"""The input benchmark measures every case, and says what is wrong with its arguments."""

from __future__ import annotations

import json

import pytest

from dvkernels.benchmarks import input as cases
from dvkernels.cli import main


def test_every_case_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        cases, "CASES", {name: (what, 3) for name, (what, _) in cases.CASES.items()}
    )
    found = tmp_path / "found.json"
    assert main.main(["bench-input", "--rounds", "1", "--json", str(found)]) == 0
    results = json.loads(found.read_text())["results"]
    assert [one["case"] for one in results] == list(cases.CASES)
    assert all(one["seconds_per_batch"] > 0 and one["times_ours"] == 1 for one in results)
    assert "us per batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--peer-python", "spark=x"], ["--peer-python", "grain"]]
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    assert main.main(["bench-input", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
