"""Figures of the report's page, as data for Plotly; the page gives the colors their values."""

from __future__ import annotations

import html
import math
from typing import Any

from dvkernels.profiler import memory_report
from dvkernels.profiler.report.analysis import Analysis
from dvkernels.profiler.report.memory_series import PROCESS
from dvkernels.profiler.report.time_split import PARTS, UPDATES
from dvkernels.profiler.report.timeline import Timeline
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["figures", "milliseconds_text"]

Figure = dict[str, Any]

_HEIGHT = 300
_ROW_HEIGHT = 34
_LONGEST = 22  # characters of a label, so that it leaves room on a phone
# By category of a span: the name of its color, which the legend shows. Later ones lie above.
_KINDS = {
    "step": "compute",
    "collective": "waiting",
    "reduce": "reduce",
    "update": "update",
    "write": "update",
    "read": "reduce",
    "input": "input",
    "range": "ranges",
    "copy": "copy",
    "kernel": "kernel",
}
_OTHER = "other"


def milliseconds_text(seconds: float) -> str:
    """Return a time in ms with three or four digits."""
    value = 1e3 * seconds
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3}f}"


def figures(table: TraceTable, found: Analysis, shown: Timeline) -> dict[str, Figure]:
    """Return the figures by the section that shows them; a section without data has none."""
    made = {
        "time": _time(found),
        "timeline": _timeline(table, shown),
        "bandwidth": _bandwidth(found),
        "late": _late(found),
        "memory": _memory(found),
    }
    return {name: figure for name, figure in made.items() if figure["data"]}


def _figure(data: list[Any], x: str, y: str, height: int = _HEIGHT, **layout: Any) -> Figure:
    axes: Figure = {
        axis: {"title": {"text": text, "standoff": 12}, "automargin": True, "zeroline": False}
        for axis, text in (("xaxis", x), ("yaxis", y))
    }
    for name, more in layout.items():
        axes[name] = {**axes.get(name, {}), **more} if isinstance(more, dict) else more
    return {"data": data, "layout": {"height": height, **axes}}


def _escaped(text: str) -> str:
    """Return a short text for Plotly, which reads some tags in it."""
    return html.escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def _time(found: Analysis) -> Figure:
    times = [each for each in found.times if each.strategy == found.times[0].strategy]
    labels = [f"replica {each.replica}" for each in times]
    data = [
        {
            "type": "bar", "orientation": "h", "name": part, "color": part, "y": labels,
            "x": [round(1e3 * t.seconds[part] / t.num_steps, 4) for t in times],
            "hovertemplate": "%{y}: " + part + " %{x} ms<extra></extra>",
        }
        for part in PARTS
    ]  # fmt: skip
    height = 140 + _ROW_HEIGHT * len(times)
    # A sequence that begins above: the first replica comes first.
    return _figure(
        data if times else [], "ms in a step", "", height, barmode="stack",
        yaxis={"autorange": "reversed", "showgrid": False},
    )  # fmt: skip


def _timeline(table: TraceTable, shown: Timeline) -> Figure:
    lanes = sorted({int(lane) for lane in table.lane[shown.rows]}, key=lambda k: _order(table, k))
    height_of = {lane: row for row, lane in enumerate(lanes)}
    by_kind: dict[str, dict[str, list[Any]]] = {}
    for row, begin, name in zip(shown.rows, shown.begins, shown.names, strict=True):
        category = table.texts[table.category[row]]
        if category == "collective" and name.startswith("reduce"):
            is_update = name.removeprefix("reduce (").startswith(UPDATES)
            category = "update" if is_update else "reduce"
        kind = _KINDS.get(category, _OTHER)
        bars = by_kind.setdefault(kind, {"x": [], "base": [], "y": [], "width": [], "text": []})
        is_range = kind == "ranges"
        bars["x"].append(round(1e3 * (table.end[row] - begin), 4))
        bars["base"].append(round(1e3 * (begin - shown.begin), 4))
        bars["y"].append(height_of[int(table.lane[row])] + (0.4 if is_range else 0.0))
        bars["width"].append(0.14 if is_range else 0.62)
        bars["text"].append(_escaped(name))
    data = [
        {
            "type": "bar", "orientation": "h", "name": kind, "color": kind, "textposition": "none",
            "hovertemplate": "%{text}: %{x} ms, from %{base} ms<extra>" + kind + "</extra>",
            **by_kind[kind],
        }
        for kind in dict.fromkeys([*_KINDS.values(), _OTHER])
        if kind in by_kind
    ]  # fmt: skip
    labels = [_escaped(_lane_label(table, lane)) for lane in lanes]
    window = [0, round(1e3 * (shown.end - shown.begin), 4)]
    return _figure(
        data, "ms", "", 150 + _ROW_HEIGHT * len(lanes), barmode="overlay", bargap=0,
        dragmode="pan", xaxis={"range": window},
        yaxis={
            "tickvals": list(range(len(lanes))), "ticktext": labels, "fixedrange": True,
            "range": [len(lanes) - 0.4, -0.6], "showgrid": False,
        },
    )  # fmt: skip


def _lane_label(table: TraceTable, lane: int) -> str:
    where = table.lanes[lane]
    name = table.lane_names.get(where, f"thread {where[1]}")
    name = name.removeprefix("dvkernels-")
    is_one = len(table.workers) == 1 or name.startswith("replica ")  # numbered over all workers
    return name if is_one else f"worker {where[0]}, {name}"


def _order(table: TraceTable, lane: int) -> tuple[Any, ...]:
    worker, thread = table.lanes[lane]
    name = table.lane_names.get((worker, thread), "")
    number = name.removeprefix("replica ")
    return worker, not number.isdecimal(), int(number) if number.isdecimal() else 0, name, thread


def _bandwidth(found: Analysis) -> Figure:
    data = []
    for number, verb in enumerate(dict.fromkeys(each.verb for each in found.bandwidths)):
        of = [each for each in found.bandwidths if each.verb == verb]  # by size
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": _escaped(verb),
                "color": f"series-{number % 6}", "symbol": number,
                "x": [each.nbytes for each in of],
                "y": [float(f"{each.algbw / 1e9:.4g}") for each in of],
                "hovertemplate": "%{x} bytes: %{y} GB/s<extra>" + _escaped(verb) + "</extra>",
            }
        )  # fmt: skip
    if not data:
        return _figure([], "", "")
    sizes = sorted({each.nbytes for each in found.bandwidths})
    ticks = sizes[:: -(-len(sizes) // 6)]
    rates = [math.log10(each.algbw / 1e9) for each in found.bandwidths]
    low, high = math.floor(min(rates) - 0.1), math.ceil(max(rates) + 0.1)
    decades = range(low, high + 1)
    return _figure(
        data, "bytes of one replica", "GB/s", showlegend=True,
        xaxis={
            "type": "log", "tickvals": ticks,
            "ticktext": [memory_report.size_text(size) for size in ticks],
            "range": [math.log10(sizes[0]) - 0.2, math.log10(sizes[-1]) + 0.2],
        },
        yaxis={
            "type": "log", "range": [low, high],
            "tickvals": [10.0**k for k in decades], "ticktext": [f"{10.0**k:g}" for k in decades],
        },
    )  # fmt: skip


def _late(found: Analysis) -> Figure:
    ranking = [each for each in found.lateness if each.strategy == found.lateness[0].strategy]
    bars = {
        "type": "bar", "orientation": "h", "name": "waited for it", "color": "waiting",
        "y": [f"replica {each.replica}" for each in ranking],
        "x": [float(f"{1e3 * each.waited_seconds:.4g}") for each in ranking],
        "hovertemplate": "%{y}: %{x} ms<extra></extra>",
    }  # fmt: skip
    return _figure(
        [bars] if ranking else [], "ms that the others waited for it", "",
        110 + _ROW_HEIGHT * len(ranking), showlegend=False,
        yaxis={"autorange": "reversed", "showgrid": False},
    )  # fmt: skip


def _memory(found: Analysis) -> Figure:
    """Draw the owners' memory, and above it that of the process, on an axis of its own."""
    owners = {owner: k for k, owner in enumerate(dict.fromkeys(m.owner for m in found.memory))}
    first = min((each.worker for each in found.memory), default=0)
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "name": each.owner,
            "legendgroup": each.owner, "showlegend": each.worker == first,
            "yaxis": "y2" if each.owner == PROCESS else "y",
            "color": f"series-{owners[each.owner] % 6}", "symbol": each.worker,
            "x": [round(second, 4) for second in each.seconds],
            "y": [round(nbytes / 2**20, 3) for nbytes in each.nbytes],
            "hovertemplate": f"worker {each.worker}, %{{x}} s: %{{y}} MiB"
            f"<extra>{_escaped(each.owner)}</extra>",
        }
        for each in found.memory
    ]  # fmt: skip
    return _figure(
        data, "s", "MiB, owners", 380, yaxis={"rangemode": "tozero", "domain": [0, 0.55]},
        yaxis2={
            "rangemode": "tozero", "domain": [0.68, 1], "nticks": 4, "automargin": True,
            "title": {"text": "MiB, process", "standoff": 12},
        },
    )  # fmt: skip
