"""Whole programs: every way has the same result, and a report has all parts."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from programs import all_cores, comparison, main, mapped, program, report, run
from programs.registry import PROGRAMS

from dvkernels.benchmarks.stopwatch import Samples

SMALL = {
    "rows": 120, "columns": 4, "size": 50, "epochs": 2, "resamples": 5, "oscillators": 10,
    "couplings": 5, "pictures": 3, "pixels": 9, "blocks": 5, "length": 100, "calls": 2,
}  # fmt: skip
COMPILED = [  # Numba compiles these for seconds
    pytest.param(name, marks=pytest.mark.wide) for name in ("sweep", "pictures", "moments")
]
OTHERS = [name for name in PROGRAMS if name not in ("sweep", "pictures", "moments")]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "programs.md"


def small(name):
    chosen = PROGRAMS[name]
    return chosen._replace(sizes={key: SMALL[key] for key in chosen.sizes})


@pytest.fixture(scope="module")
def cores():
    with all_cores.AllCores(1) as processes:
        yield processes


@pytest.mark.parametrize("name", [*OTHERS, *COMPILED])
def test_every_way_has_the_same_result_and_a_time(name, cores):
    pytest.importorskip("joblib")
    found = comparison.compare(small(name), 2, 2, cores).as_record()
    json.dumps(found)
    measured = {way["name"] for way in found["ways"]}
    known = {each.name for each in PROGRAMS[name].neighbours}
    assert measured - {program.ALL_CORES} | found["skipped"].keys() == known
    assert (program.ALL_CORES in measured) == (PROGRAMS[name].share is not None)
    assert all(len(way["rounds"]) == 2 and min(way["rounds"]) > 0 for way in found["ways"])
    for way in found["ways"]:
        compared = way["name"] not in (program.ALL_CORES, "SGDClassifier")
        assert (way["difference"] is not None) == compared
    for part in (PROGRAMS[name].name, found["description"], *measured):
        assert part in report.text(found)


def test_a_wrong_result_is_an_error(cores):
    def wrong(rows, count):
        yield lambda: np.zeros(4)

    broken = small("logistic")
    broken = broken._replace(neighbours=(broken.neighbours[0], program.Neighbour("wrong", wrong)))
    with pytest.raises(comparison.DifferentResultError, match="the result of wrong differs"):
        comparison.compare(broken, 2, 1, cores)


@pytest.mark.parametrize("needs", ["no_such_package", "numpy:no_such_name"])
def test_a_way_whose_library_is_missing_is_skipped_with_a_word(needs, cores):
    with_missing = small("batches")
    first = with_missing.neighbours[0]
    missing = first._replace(name="missing", needs=needs)
    found = comparison.compare(with_missing._replace(neighbours=(first, missing)), 2, 1, cores)
    assert "no" in found.skipped["missing"]
    text = report.text(found.as_record())
    assert "missing skipped: " in text
    assert "times ours" not in text


@pytest.mark.parametrize(("share", "is_busy"), [(None, False), (0.05, False), (0.3, True)])
def test_a_busy_machine_is_called_one(share, is_busy):
    chosen = small("batches")
    samples = {chosen.neighbours[0].name: Samples((1.0,))}
    found = comparison.Comparison(chosen, 2, samples, {}, {}, share)
    assert ("too much" in report.text(found.as_record())) == is_busy


def test_ways_that_map_take_three_lines_at_most():
    assert all(each.lines <= 3 for each in mapped.neighbours())


def counted_as_three(data, count):
    """Do something."""
    first = data  # one

    def program():
        second = first
        # not a line
        return second

    yield program


def test_lines_of_code_are_those_of_the_user():
    assert program.lines_of_code(counted_as_three) == 3


def test_goals_compare_round_by_round():
    found = {
        program.OURS: Samples((1.0, 4.0, 1.0)),
        "x": Samples((1.0, 2.0, 1.0)),
        program.ALL_CORES: Samples((0.5, 2.0, 0.5)),
    }
    values = {
        goal.value(found): goal.is_met_by(goal.value(found))
        for goal in (program.of_possible(0.6), program.at_most(1.0, "x"), program.microseconds(2e6))
    }
    assert values == {0.5: False, 1.0: True, 1e6: True}
    goal = program.within_quartiles("x")
    assert goal.is_met_by(goal.value(found))


def test_the_command_writes_what_the_table_is_made_from(cores, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "AllCores", lambda count: contextlib.nullcontext(cores))
    monkeypatch.setitem(PROGRAMS, "batches", small("batches"))
    found = str(tmp_path / "found.json")
    assert main.main(["batches", "--rounds", "2", "--replicas", "1", "--json", found]) == 0
    out = capsys.readouterr().out
    for part in ("commit: ", "machine: ", "numpy", "openblas", "goal ", "possible (1 replica)"):
        assert part in out.lower()
    assert main.main(["table", found]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}
    assert "**dvkernels**" in table
    assert "2 alternating rounds" in table


@pytest.mark.parametrize(
    "arguments", [["no-such-program"], ["--json", "/proc/no/such.json"], ["table", __file__]]
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    assert main.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_help_names_the_programs_and_the_defaults():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert set(PROGRAMS) <= set(parser.format_help().replace(",", " ").replace(";", " ").split())
    assert all(action.help for action in parser._actions)


def test_the_page_shows_the_table_of_its_data():
    data = PAGE.parent / "data" / "programs.json"
    if not data.exists():
        pytest.skip("not measured yet")
    table = report.markdown(json.loads(data.read_text(encoding="utf-8")))
    assert table in PAGE.read_text(encoding="utf-8")
