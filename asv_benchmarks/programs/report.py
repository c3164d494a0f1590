"""Reports of comparisons: text for the terminal, and a table in Markdown for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers.machine import BUSY

from dvkernels.cli.argument_types import counted
from programs.program import OURS

__all__ = ["markdown", "text"]

# Comparisons are records here, as :meth:`programs.comparison.Comparison.as_record` makes them.
Record = Mapping[str, Any]


def text(record: Record) -> str:
    """Return the lines of one program."""
    lines = [f"# {record['program']}: {record['description']}"]
    for way in record["ways"]:
        times = _times_ours(way) and f"{_times_ours(way)} times ours"
        code = "" if way["lines"] is None else counted(way["lines"], "line")
        note = "(other arithmetic)" if _is_landmark(way) else ""
        time = f"{_time(way)} per {record['unit']}"
        lines.append(f"{way['name']:31}{time:44}{times:>34}{code:>10} {note}".rstrip())
    remarks = [f"{name} skipped: {why}" for name, why in record["skipped"].items()]
    remarks += _speed_up(record)
    remarks += [
        f"goal {'met' if goal['is_met'] else 'MISSED'}: {goal['goal']}; it is {goal['value']:.4g}"
        for goal in record["goals"]
    ]
    remarks += _others([record])
    return "\n".join([*lines, *(f"# {remark}" for remark in remarks)])


def markdown(found: Record) -> str:
    """Return the table of the page, and the paragraph below it, from the JSON of a run."""
    rows: list[Sequence[str]] = [
        ("program", "way", "median (quartiles)", "times ours (quartiles)", "lines")
    ]
    for record in found["results"]:
        description = f"{record['description']}; per {record['unit']}"
        for way in record["ways"]:
            name = f"**{OURS}**" if way["name"] == OURS else way["name"]
            name += " (other arithmetic)" if _is_landmark(way) else ""
            lines = "" if way["lines"] is None else str(way["lines"])
            rows.append((description, name, _time(way), _times_ours(way), lines))
            description = ""
        rows += [("", "", speed_up, "", "") for speed_up in _speed_up(record)]
        for goal in record["goals"]:
            verdict = "goal met" if goal["is_met"] else "**goal missed**"
            rows.append(("", verdict, goal["goal"], f"{goal['value']:.4g}", ""))
        rows += [("", name, f"skipped: {why}", "", "") for name, why in record["skipped"].items()]
    head, *body = (f"| {' | '.join(row)} |".replace(" us ", " µs ") for row in rows)
    versions = {**found["versions"], **found.get("peers", {})}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    below = [
        f"{found['machine']}; {packages}, {found['blas']}; {found['date']}, commit "
        f"{found['commit']}; {counted(found['rounds'], 'alternating round')}",
        *_others(found["results"]),
    ]
    return "\n".join([head, "|---|---|---|---|---|", *body, "", f"{'; '.join(below)}."])


def _time(way: Record) -> str:
    low, high = way["quartiles"]
    unit, scale = ("ms", 1e3) if high >= 1e-3 else ("us", 1e6)
    return f"{way['seconds'] * scale:.2f} {unit} ({low * scale:.2f} to {high * scale:.2f})"


def _times_ours(way: Record) -> str:
    if way["name"] == OURS:
        return "1"
    return "" if way["times_ours"] is None else _ratio(way["times_ours"])


def _ratio(of_rounds: Record) -> str:
    low, high = of_rounds["quartiles"]
    return f"{of_rounds['median']:.2f} ({low:.2f} to {high:.2f})"


def _is_landmark(way: Record) -> bool:
    return way["lines"] is not None and way["difference"] is None


def _speed_up(record: Record) -> list[str]:
    """Say what the speed-up is, and of what possible one, where both were measured."""
    ours, possible, share = (
        record[name] for name in ("speed_up", "possible_speed_up", "of_possible")
    )
    if share is None:
        return []
    replicas = counted(record["replicas"], "replica")
    return [
        f"speed-up {ours['median']:.2f} of {possible['median']:.2f} possible ({replicas}): "
        f"{_ratio(share)}"
    ]


def _others(records: Sequence[Record]) -> list[str]:
    """Say how much of the cores other programs took, where that is known."""
    shares = [r["others_share"] for r in records if r["others_share"] is not None]
    if not shares:
        return []
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    remark = f"other programs took {low if low == high else f'{low} to {high}'} % of the cores"
    return [remark + (", too much for a comparison" if max(shares) > BUSY else "")]
