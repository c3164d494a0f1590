"""History of our time as a multiple of C's for the same all-reduce: file, and the rule for slower.

A run has a ratio for each case, the median of alternating rounds with its quartiles. A run is a
line of JSON, so that a commit which adds runs adds lines. Ratios of two machines are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dvkernels.errors import AlgorithmError

__all__ = ["FILE", "THRESHOLD", "WINDOW", "LimitRun", "Verdict", "load", "text_of", "verdicts"]

FILE = Path(__file__).parents[1] / "limit_history.jsonl"
WINDOW = 3  # runs
THRESHOLD = 0.05


class LimitRun(NamedTuple):
    """One run on one machine of one commit."""

    commit: str
    committed: str  # when, in UTC
    date: str  # of the run
    machine: str
    probe: str  # the vectors and threads of the C kernel
    rounds: int
    others_share: float | None  # of the cores
    times_of_c: Mapping[str, Sequence[float]]  # case -> median, lower and upper quartile


class Verdict(NamedTuple):
    """A commit beside earlier ones, in one case: ratios to the time of C."""

    earlier: float  # the least of the maxima of WINDOW successive earlier runs
    now: float  # the minimum of the WINDOW runs that begin with the commit's first one

    @property
    def change(self) -> float:
        """The relative change, above 0 where the commit is slower."""
        return self.now / self.earlier - 1

    @property
    def is_slower(self) -> bool:
        """Whether the best run is more than THRESHOLD above the worst one of a good time before."""
        return self.change > THRESHOLD


def load(path: Path) -> list[LimitRun]:
    """Return the runs of a history, in the order of the commits; a missing file is an empty one.

    Raises
    ------
    AlgorithmError
        A line is not a run.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            run = LimitRun(**json.loads(line))
            assert all(len(ratio) == 3 and min(ratio) > 0 for ratio in run.times_of_c.values())
        except (ValueError, TypeError, AttributeError, AssertionError):
            raise AlgorithmError(
                f"limits: expected a run in line {number} of {path}; remove the line, or restore "
                f"the file with git"
            ) from None
        runs.append(run)
    return sorted(runs, key=lambda run: run.committed)


def text_of(runs: Sequence[LimitRun]) -> str:
    """Return the text of the file."""
    return "".join(json.dumps(run._asdict()) + "\n" for run in runs)


def verdicts(commits: Sequence[str], ratios: Sequence[float]) -> dict[str, Verdict]:
    """Compare each commit with the earlier ones, in one case.

    Parameters
    ----------
    commits : sequence of str
        Commit of each run; runs of one commit lie together.
    ratios : sequence of float
        Ratio of each run.

    Returns
    -------
    dict
        Verdict of each commit that has WINDOW runs before it, and WINDOW from its first one on. A
        slower commit is reported once: those after it are compared with it and its successors.

    Notes
    -----
    The minimum after and the maximum before ignore a run that was disturbed, on either side. The
    least of the maxima is the level that was once held for a whole window: a loss of 2 % in each of
    several commits is found when they add up to more than the threshold, and a regression after an
    improvement is measured against the improvement.
    """
    found: dict[str, Verdict] = {}
    begin = 0  # of the runs to compare with
    for first in range(1, len(ratios) - WINDOW + 1):
        if commits[first] == commits[first - 1] or first - begin < WINDOW:
            continue
        earlier = [max(ratios[k : k + WINDOW]) for k in range(begin, first - WINDOW + 1)]
        verdict = Verdict(min(earlier), min(ratios[first : first + WINDOW]))
        found[commits[first]] = verdict
        if verdict.is_slower:
            begin = first
    return found
