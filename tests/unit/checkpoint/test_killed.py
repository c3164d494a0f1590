"""Runs that are killed at random moments and restarted end like an uninterrupted run.

A thousand kills: ``python -m pytest -m slow tests/unit/checkpoint/test_killed.py -s``
"""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
from kills import run_and_kill

from dvkernels.checkpoint.format.step_names import within
from dvkernels.checkpoint.restoring.reader import open_reader

SMALL_RUN = str(Path(__file__).with_name("small_run.py"))


def command(folder, steps, *options):
    return [sys.executable, SMALL_RUN, str(folder), str(steps), *options]


def result(output):
    (line,) = (line for line in output.splitlines() if line.startswith("result"))
    return line.split()[1:]


def check_what_is_left(folder):
    """Every folder with the name of a checkpoint is whole."""
    found = within(folder)
    assert found, "a step had been saved before the kill"
    for path in found:
        with contextlib.closing(open_reader(path)) as reader:
            reader.check(reader.manifest.tensors)


def run_killed(folder, steps, kills, seed, *options):
    def is_under_way(output):  # the first step is done and saved
        return "step" in output and bool(within(folder))

    killed = run_and_kill(
        command(folder, steps, *options), most_kills=kills, seed=seed, longest_seconds=0.15,
        is_under_way=is_under_way, after_kill=lambda _: check_what_is_left(folder),
    )  # fmt: skip
    return killed.num_kills, result(killed.output)


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.wide), ["--background"]])
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, options):
    steps = 60
    whole = result(run_and_kill(command(tmp_path / "whole", steps), most_kills=0, seed=0).output)
    num_kills, killed = run_killed(tmp_path / "killed", steps, 2, 1, *options)
    assert killed == whole
    assert num_kills > 0


@pytest.mark.wide
def test_a_killed_run_on_other_numbers_of_replicas_ends_within_rounding(tmp_path):
    steps = 40
    whole = result(run_and_kill(command(tmp_path / "whole", steps), most_kills=0, seed=0).output)
    folder = tmp_path / "killed"
    for replicas, reached in ((1, 10), (3, 20)):
        run_and_kill(
            command(folder, reached, "--replicas", str(replicas)), most_kills=0, seed=0
        )  # fmt: skip
    _, (_, norm) = run_killed(folder, steps, 1, 2)
    assert float(norm) == pytest.approx(float(whole[1]), rel=1e-12)


@pytest.mark.slow
def test_a_thousand_kills(tmp_path):
    steps, wanted, kills = 400, 1000, 0
    whole = result(run_and_kill(command(tmp_path / "whole", steps), most_kills=0, seed=0).output)
    for number in itertools.count():
        options = [[], ["--background"]][number % 2]
        folder = tmp_path / f"round-{number}"
        some, killed = run_killed(folder, steps, wanted - kills, number, *options)
        assert killed == whole
        kills += some
        print(f"round {number}: {some} kills, {kills} in all, the result is the same", flush=True)
        if kills >= wanted:
            break
