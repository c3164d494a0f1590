"""``python -m dvkernels bench``: collectives by size, beside the memory limit and peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.benchmarks import cases, machine, memory, plot, report, sizes
from dvkernels.benchmarks.cases import Case
from dvkernels.benchmarks.contest import Contest, Row
from dvkernels.benchmarks.failures import BenchmarkError
from dvkernels.benchmarks.peers import registry

__all__: list[str] = []

HELP = "time collectives by size, beside what memory allows and beside peers, and check them"

_MEMORY_SHARE = 0.7  # of what is available: libraries take more than what they are given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Their values are read by ``run``, whose errors fit in one line."""
    parser.add_argument(
        "collectives",
        nargs="*",
        metavar="COLLECTIVE",
        help=f"{', '.join(cases.COLLECTIVES)} (default: all_reduce)",
    )
    parser.add_argument("--sizes", default="4:256M", help="MIN:MAX or one size (default 4:256M)")
    parser.add_argument("--factor", default="4", help="from one size to the next (default 4)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--op", default="sum")
    parser.add_argument("--replicas", default="2")
    parser.add_argument("--algorithm", default="auto", help="of all_reduce: auto, direct, ring")
    parser.add_argument("--rounds", default="20", help="alternating rounds a size (default 20)")
    parser.add_argument("--seed", default="0")
    parser.add_argument(
        "--peers", nargs="*", metavar="PEER", help=f"all, or some of {', '.join(registry.NAMES)}"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the interpreter of an environment that has the peer; repeatable",
    )
    parser.add_argument(
        "--peer-timeout", default="120", help="seconds for one answer of a peer (default 120)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw bus bandwidth by size")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="one JSON object instead of a table"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check and time every case; 1 if an element was wrong."""
    collectives = [cases.check_name(name) for name in arguments.collectives or ["all_reduce"]]
    dtype = _dtype(arguments.dtype)
    op = _op(arguments.op, dtype, collectives)
    num_replicas = _number("--replicas", arguments.replicas, 1)
    num_rounds = _number("--rounds", arguments.rounds, 1)
    seed = _number("--seed", arguments.seed, 0)
    timeout = _number("--peer-timeout", arguments.peer_timeout, 1)
    steps = list(sizes.steps(arguments.sizes, _number("--factor", arguments.factor, 2)))
    interpreters = _interpreters(arguments.peer_python)
    peers = _peers(arguments.peers, interpreters)
    picture = Path(arguments.plot) if arguments.plot is not None else None
    if picture is not None:
        plot.check(picture)
    json_path = _json_path(arguments.json)

    def case_of(collective: str, count: int) -> Case:
        return Case(collective, count, dtype, op, num_replicas, arguments.algorithm, seed)

    for collective in collectives:  # what no size can do is said before the first is measured
        cases.ours(cases.Arrays(case_of(collective, 1)))()
    counts = list(dict.fromkeys(max(1, nbytes // dtype.itemsize) for nbytes in steps))
    planned = [case_of(collective, count) for collective in collectives for count in counts]
    planned, notes = _that_fit(planned, peers)

    about = machine.describe(sys.argv[2:])
    about["rounds"] = num_rounds
    out = _Output(is_silent=arguments.json == "-")
    rows: list[Row] = []
    with Contest(peers, interpreters, num_replicas, num_rounds, timeout, _progress) as contest:
        about["peers"] = dict(contest.versions)
        for text in report.heading(about):
            out.say(text)
        for note in notes:
            out.say(f"# note: {note}")
            print(f"note: {note}", file=sys.stderr)
        for text in report.absences(contest.skipped, []):
            out.say(text)
        shown = num_lost = 0
        for collective in collectives:
            for text in report.table_heading(collective, num_replicas):
                out.say(text)
            own = [case for case in planned if case.collective == collective]
            if own and not registry.offers(own[0]):
                for name in contest.versions.keys() - {"numpy"}:
                    out.say(f"# {name} does not offer this case here: all_reduce, sum, float only")
            for case in own:
                _progress(f"{collective}, {sizes.spell(case.nbytes)}")
                rows.extend(contest.rows(case))
                for row in rows[shown:]:
                    out.say(report.line(row))
                shown = len(rows)
                for absence in contest.failures[num_lost:]:
                    for text in report.absences([], [absence]):
                        out.say(text.replace("\n", "\n#   "))
                    print(f"lost {absence.peer}: {absence.reason}", file=sys.stderr)
                num_lost = len(contest.failures)
        skipped, failures = contest.skipped, contest.failures
    num_wrong = sum(row.wrong for row in rows)
    out.say(f"# wrong elements: {num_wrong}")
    if json_path is not None:
        text = report.as_json(about, rows, skipped, failures, notes)
        if arguments.json == "-":
            print(text)
        else:
            json_path.write_text(text + "\n", encoding="utf-8")
    if picture is not None:
        plot.draw(rows, f"{about['processor']}, {about['date']}, {about['command']}", picture)
    return 1 if num_wrong else 0


class _Output:
    """Standard output, unless it is for the JSON object alone."""

    def __init__(self, is_silent: bool) -> None:
        self._is_silent = is_silent

    def say(self, text: str) -> None:
        if not self._is_silent:
            print(text, flush=True)


def _progress(text: str) -> None:
    """Say what is being done where a person looks on."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        print(text, file=sys.stderr)


def _number(option: str, text: str, lowest: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if number < lowest:
        raise BenchmarkError(f"{option} takes a whole number of at least {lowest}, got {text!r}")
    return number


def _dtype(text: str) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16

    try:
        dtype = np.dtype(text)
    except TypeError:
        raise BenchmarkError(f"no dtype {text!r}; float32, bfloat16 and int64 are some") from None
    if dtype.name != "bfloat16" and (dtype.kind not in "biufc" or dtype.itemsize > 16):
        raise BenchmarkError(f"no collective works on {dtype}; float32, bfloat16 and int64 do")
    return dtype


def _op(text: str, dtype: np.dtype[Any], collectives: list[str]) -> str:
    op = reduce_op.parse(text)
    for collective in collectives:
        if cases.COLLECTIVES[collective].reduces:
            reduce_op.check_dtype(collective, op, dtype)
    return str(op.value) if isinstance(op, reduce_op.ReduceOp) else text


def _interpreters(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in registry.PEERS:
            raise BenchmarkError(
                f"--peer-python takes PEER=PATH with one of {', '.join(registry.PEERS)}, "
                f"got {pair!r}"
            )
        if not Path(path).is_file():
            raise BenchmarkError(f"--peer-python {name}: there is no file {path}")
        found[name] = path
    return found


def _peers(names: list[str] | None, interpreters: dict[str, str]) -> list[str]:
    """Return the peers that are asked for; one whose interpreter is named is."""
    if names is None:
        return list(interpreters)
    if names in ([], ["all"]):
        return list(registry.NAMES)
    return list(dict.fromkeys([*registry.check_names(names), *interpreters]))


def _json_path(text: str | None) -> Path | None:
    if text is None:
        return None
    if text in cases.COLLECTIVES:
        raise BenchmarkError(f"--json {text} would write a file of that name; put --json last")
    path = Path(text)
    if text != "-":
        plot.check_writable(path)
    return path


def _that_fit(planned: list[Case], peers: list[str]) -> tuple[list[Case], list[str]]:
    """Leave out what memory has no room for, and say so."""
    available = memory.available_bytes()
    if available is None:
        return planned, ["nobody says how much memory is available; no size was left out"]

    def needed(case: Case) -> int:
        copies = sum(registry.PEERS[name].copies for name in peers if name in registry.PEERS)
        peers_bytes = copies * case.num_replicas * case.nbytes if registry.offers(case) else 0
        return 2 * case.touched_bytes + peers_bytes  # twice: the probe has buffers of its own

    budget = int(_MEMORY_SHARE * available)
    fitting = [case for case in planned if needed(case) <= budget]
    notes = []
    for collective in dict.fromkeys(case.collective for case in planned):
        left_out = [c for c in planned if c.collective == collective and needed(c) > budget]
        if left_out:
            names = ", ".join(sizes.spell(case.nbytes) for case in left_out)
            notes.append(
                f"{collective}: {names} left out, which would take up to "
                f"{sizes.spell(needed(left_out[-1]))} of memory; {sizes.spell(available)} is "
                f"available, and {_MEMORY_SHARE:.0%} of it is used at most"
            )
    if not fitting:
        raise BenchmarkError(f"there is no memory for any size: {'; '.join(notes)}")
    return fitting, notes
