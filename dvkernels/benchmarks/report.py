"""Rows as a table for people, in the manner of nccl-tests, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dvkernels.benchmarks.cases import COLLECTIVES
from dvkernels.benchmarks.contest import Absence, Row

__all__: list[str] = []

#           title, unit, width
_COLUMNS = (
    ("size", "(bytes)", 12),
    ("count", "(elements)", 12),
    ("dtype", "", 11),
    ("op", "", 5),
    ("algorithm", "", 10),
    ("time", "(us)", 11),
    ("spread", "(quartiles)", 19),
    ("algbw", "(GB/s)", 8),
    ("busbw", "(GB/s)", 8),
    ("attained", "(of probe)", 11),
    ("of ours", "(time)", 8),
    ("#wrong", "", 7),
)


def heading(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was measured, where and when."""
    for name, value in about.items():
        yield f"# {name}: {value}"


def table_heading(collective: str, num_replicas: int) -> Iterator[str]:
    """Yield the two lines over the rows of one collective."""
    yield "#"
    yield f"# {collective}, {num_replicas} replicas"
    yield "#" + "".join(f"{title:>{width}}" for title, _, width in _COLUMNS) + "  by"
    yield "#" + "".join(f"{unit:>{width}}" for _, unit, width in _COLUMNS)


def line(row: Row) -> str:
    """Return one row of the table."""
    entry = as_dict(row)
    low, high = entry["quartiles_us"]
    cells = (
        entry["size"],
        entry["count"],
        entry["dtype"],
        entry["op"] or "-",
        entry["algorithm"] or "-",
        f"{entry['time_us']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{entry['algbw']:.3f}",
        f"{entry['busbw']:.3f}",
        f"{entry['attained']:.3f}",
        f"{entry['times_ours']:.2f}",
        entry["wrong"],
    )
    padded = (f"{cell:>{width}}" for cell, (_, _, width) in zip(cells, _COLUMNS, strict=True))
    by = row.contestant + (f" ({row.variant})" if row.variant else "")
    return " " + "".join(padded) + f"  {by}"


def absences(skipped: Sequence[Absence], failures: Sequence[Absence]) -> Iterator[str]:
    """Yield who did not take part, or did not to the end, and why."""
    for absence in skipped:
        yield f"# skipped {absence.peer}: {absence.reason}"
        yield f"#   to add it: {absence.remedy}"
    for absence in failures:
        yield f"# lost {absence.peer}: {absence.reason}"


def as_dict(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it; times in microseconds, bandwidths in GB/s."""
    case = row.case
    collective = COLLECTIVES[case.collective]
    is_ours = row.contestant == "dvkernels"
    return {
        "collective": case.collective,
        "by": row.contestant,
        "variant": row.variant or None,
        "size": case.nbytes,
        "count": case.count,
        "dtype": case.dtype.name,
        "op": case.op if collective.reduces else None,
        "algorithm": case.algorithm if collective.has_algorithms and is_ours else None,
        "replicas": case.num_replicas,
        "time_us": row.timing.median * 1e6,
        "quartiles_us": [seconds * 1e6 for seconds in row.timing.quartiles],
        "rounds": len(row.timing.seconds),
        "calls_a_round": row.timing.calls_a_round,
        "algbw": row.algbw,
        "busbw": row.busbw,
        "moved_bytes": case.moved_bytes,
        "attained": row.attained,
        "times_ours": row.times_ours,
        "wrong": row.wrong,
    }


def as_json(
    about: Mapping[str, Any],
    rows: Iterable[Row],
    skipped: Sequence[Absence],
    failures: Sequence[Absence],
    notes: Sequence[str],
) -> str:
    """Return one JSON object with everything."""
    return json.dumps(
        {
            "about": dict(about),
            "notes": list(notes),
            "rows": [as_dict(row) for row in rows],
            "skipped": [vars(absence) for absence in skipped],
            "failures": [vars(absence) for absence in failures],
        },
        indent=1,
    )
