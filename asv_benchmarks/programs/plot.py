"""``python -m programs plot``: the figure of the page on whole programs, from a run's JSON.

A panel for each program, a bar for each way: its time as a multiple of this library's, the median
of the rounds with its quartiles, and its lines of code. Text stays text, so that the file is small
and can be searched.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dvkernels.cli import output_paths
from dvkernels.cli.argument_types import counted
from dvkernels.profiler.atomic_file import AtomicFile
from programs import table
from programs.program import ALL_CORES, OURS

__all__ = ["draw", "source_of"]

HELP = "draw the results of a run, from its JSON"

_COLOURS = {OURS: "tab:blue", ALL_CORES: "0.9"}
_OF_OTHERS = "0.75"
_MOST = 4.0  # times ours; longer bars are cut, with their number beside
_WIDTH, _BAR, _HEAD = 9.0, 0.22, 0.5  # inches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", help="what run --json has written")
    parser.add_argument("plot", metavar="PLOT", help="file to draw into, such as programs.svg")


def run(arguments: argparse.Namespace) -> int:
    """Draw, after a check that the figure can be written."""
    path = output_paths.plot(arguments.plot)
    draw(table.found_in(arguments.file), path)
    return 0


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the programs that have neighbours to compare with."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    records = [record for record in found["results"] if _bars(record)]
    heights = [_HEAD + _BAR * len(_bars(record)) for record in records]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(records), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, record in zip(panels, records, strict=True):
        _draw_program(axes, record)
    panels[-1].set_xlabel("time, as a multiple of that of dvkernels (median, quartiles)")
    kind = path.suffix.removeprefix(".").lower()
    about = {"Date": None, "Description": source_of(found)} if kind == "svg" else None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "programs"}):
        AtomicFile(path).fill(lambda file: figure.savefig(file, format=kind, metadata=about))


def source_of(found: dict[str, Any]) -> str:
    """Return the words by which a figure names the run that it shows."""
    return f"{found['date']}, commit {found['commit']}, {found['rounds']} rounds"


def _bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ways with a ratio to ours: none where ours was not measured."""
    return [way for way in record["ways"] if way["times_ours"] is not None]


def _draw_program(axes: Any, record: dict[str, Any]) -> None:
    bars = _bars(record)[::-1]  # the first one on top
    for place, way in enumerate(bars):
        middle = way["times_ours"]["median"]
        low, high = way["times_ours"]["quartiles"]
        axes.barh(place, min(middle, _MOST), color=_COLOURS.get(way["name"], _OF_OTHERS))
        if middle < _MOST:
            axes.plot([low, min(high, _MOST)], [place, place], color="black", linewidth=1)
        label = f"{middle:.2f}" if way["name"] != OURS else "1"
        label += f" ({counted(way['lines'], 'line')})" if way["lines"] is not None else ""
        axes.annotate(
            label,
            (min(max(high, middle), _MOST), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_yticks(range(len(bars)), [way["name"] for way in bars], fontsize=8)
    axes.axvline(1, color=_COLOURS[OURS], linewidth=0.8, zorder=0)
    axes.set_xlim(0, _MOST + 0.6)
    axes.set_title(record["description"], fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
