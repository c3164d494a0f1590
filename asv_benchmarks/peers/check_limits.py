"""``python -m peers check-limits``: whether a commit is slower than earlier ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dvkernels.cli.argument_types import counted
from dvkernels.errors import AlgorithmError
from peers import limit_history
from peers.limit_history import THRESHOLD, WINDOW, LimitRun, Verdict

__all__: list[str] = []

HELP = "say whether a commit is slower than earlier ones, by the history of the limits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "commit", nargs="?", metavar="COMMIT", help="its first digits; the newest if none is named"
    )
    parser.add_argument(
        "--history", metavar="FILE", default=str(limit_history.FILE), help="file of the history"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each machine and case; return 1 if the commit is slower in any."""
    runs = limit_history.load(Path(arguments.history))
    own = [each for each in runs if each.commit.startswith(arguments.commit or "")]
    if not own:
        raise AlgorithmError(
            f"check-limits: expected a commit of {arguments.history}; got "
            f"{arguments.commit or 'an empty history'}; measure it with "
            f"python -m peers record-limits"
        )
    commit = own[-1].commit
    machines = dict.fromkeys(each.machine for each in own if each.commit == commit)
    verdicts = {
        machine: _verdicts(commit, [each for each in runs if each.machine == machine])
        for machine in machines
    }
    decided = [verdict for found in verdicts.values() for verdict in found.values()]
    if not decided:
        raise AlgorithmError(
            f"check-limits: expected {WINDOW} runs before commit {commit} and {WINDOW} from it on, "
            f"on one machine; add runs with python -m peers record-limits"
        )
    for machine, found in verdicts.items():
        print(f"# commit {commit}, {machine}; times as multiples of C's")
        for case, verdict in found.items():
            print(
                f"{case:18} {verdict.now:.3f}, before {verdict.earlier:.3f}: {verdict.change:+.1%}"
                f"{'  SLOWER' if verdict.is_slower else ''}"
            )
    slower = sum(verdict.is_slower for verdict in decided)
    print(f"# slower by more than {THRESHOLD:.0%} in {slower} of {counted(len(decided), 'case')}")
    return 1 if slower else 0


def _verdicts(commit: str, runs: Sequence[LimitRun]) -> dict[str, Verdict]:
    """Return the verdict in each case that has enough runs of one machine."""
    found = {}
    for case in dict.fromkeys(case for run in runs for case in run.times_of_c):
        measured = [run for run in runs if case in run.times_of_c]
        ratios = [run.times_of_c[case][0] for run in measured]
        verdict = limit_history.verdicts([run.commit for run in measured], ratios).get(commit)
        if verdict is not None:
            found[case] = verdict
    return found
