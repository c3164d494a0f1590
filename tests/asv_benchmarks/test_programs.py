"""Whole programs: every way has the same result, and a report has all parts."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from programs import (
    all_cores,
    comparison,
    main,
    mapped,
    network,
    other_processes,
    plot,
    program,
    report,
    run,
)
from programs.registry import PROGRAMS

import dvkernels as dv
from dvkernels.benchmarks.stopwatch import Samples

SMALL = {
    "rows": 120, "columns": 4, "size": 50, "epochs": 2, "resamples": 5, "oscillators": 10,
    "couplings": 5, "pictures": 3, "pixels": 9, "blocks": 5, "length": 100, "calls": 2,
    "hidden": 8, "batch": 4000,
}  # fmt: skip
LONG = ("digits", "sweep", "pictures", "moments")  # to compile, or to load
COMPILED = [pytest.param(name, marks=pytest.mark.wide) for name in LONG]
OTHERS = [name for name in PROGRAMS if name not in (*LONG, "digits-1024")]
ABSENT = dict.fromkeys(other_processes.PEERS, "/no/such/python")
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
    found = comparison.compare(small(name), 2, 2, cores, ABSENT).as_record()
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


def random_digits(**sizes):
    """Return random images of two classes in place of the digits."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((60, 64), np.float32), rng.integers(0, 2, 60)
    rows = list(network._batches(dv.Dataset.range(60), 20, 2))
    weights = network.mlp.initial_weights(8, "float32", 0)
    return network.Training(images, labels, np.stack(rows), weights, 2)


def digits_beside(*others):
    """Return the training of a small network by NumPy and by others."""
    chosen = PROGRAMS["digits"]
    neighbours = (chosen.neighbours[0], *others)
    return chosen._replace(
        neighbours=neighbours, make=random_digits, units=lambda sizes: 6, goals=(), share=None
    )


def test_replicas_train_as_numpy_does():
    ours = [each for each in PROGRAMS["digits"].neighbours if each.name.startswith(program.OURS)]
    assert len(ours) == 2
    found = comparison.compare(digits_beside(*ours), 2, 1, None)
    assert found.differences.keys() == found.samples.keys()
    assert max(found.differences.values()) <= 1e-6


@pytest.mark.parametrize("name", other_processes.PEERS)
@pytest.mark.wide
def test_another_library_has_the_same_result(name):
    if why := other_processes.why_skipped(name, {}):
        pytest.skip(why)
    chosen = digits_beside(program.Neighbour("beside", peer=name))
    found = comparison.compare(chosen, 2, 2, None)
    assert found.skipped == {}
    assert found.differences["beside"] <= chosen.tolerance
    assert min(found.samples["beside"].seconds) > 0


WORKER = """
import program_server

def write(data):
    weights = program_server.layers(data["weights"])
    yield lambda: [{result}]

program_server.serve(write)
"""


@pytest.mark.parametrize(
    ("result", "words"),
    [("each * 0 for each in weights", "differs"), ("1 / 0 for _ in weights", "ZeroDivisionError")],
)
def test_a_peer_is_checked_and_its_failure_reported(result, words, monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(result=result))
    fake = other_processes.PEERS["jax"]._replace(package="numpy", script=str(script))
    monkeypatch.setattr(other_processes, "PEERS", {"fake": fake})
    chosen = digits_beside(program.Neighbour("beside", peer="fake"))
    assert chosen.neighbours[1].lines == 2
    if words == "differs":
        with pytest.raises(comparison.DifferentResultError, match="the result of beside differs"):
            comparison.compare(chosen, 2, 1, None)
    else:
        found = comparison.compare(chosen, 2, 1, None)
        assert words in found.skipped["beside"]
        assert "beside" not in found.samples


def test_peers_that_are_absent_are_named():
    chosen = digits_beside(*(each for each in PROGRAMS["digits"].neighbours if each.peer))
    text = report.text(comparison.compare(chosen, 2, 1, None, ABSENT).as_record())
    for name in other_processes.PEERS:
        assert f"--peer-python {name}=PATH" in text
    assert other_processes.versions(ABSENT) == dict.fromkeys(ABSENT, "absent")


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
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n| program | way |\n|---|---|\n\nOld words.\n\nMore.\n")
    assert main.main(["table", found, "--page", str(page)]) == 0
    assert page.read_text() == f"# Page\n\n{table}\nMore.\n"
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}
    assert "**dvkernels**" in table
    assert "2 alternating rounds" in table


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-program"],
        ["--json", "/proc/no/such.json"],
        ["--peer-python", "horovod=python"],
        ["table", __file__],
        ["table", str(PAGE.parent / "data" / "programs.json"), "--page", __file__],
        ["plot", __file__, "/proc/no/such.svg"],
    ],
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
    found = json.loads(data.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert report.markdown(found) in page
    assert "(programs.svg)" in page
    assert plot.source_of(found) in PAGE.with_name("programs.svg").read_text(encoding="utf-8")


@pytest.mark.wide
def test_the_plot_has_every_way_of_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    data, drawn = PAGE.parent / "data" / "programs.json", tmp_path / "programs.svg"
    assert main.main(["plot", str(data), str(drawn)]) == 0
    found, figure = json.loads(data.read_text()), drawn.read_text()
    for record in found["results"]:
        assert all(way["name"] in figure for way in record["ways"])
    assert plot.source_of(found) in figure
