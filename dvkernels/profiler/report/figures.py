"""Figures of the report's page, as data for Plotly; the page gives the colors their values."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from dvkernels.profiler.report.analysis import Analysis
from dvkernels.profiler.report.time_split import PARTS
from dvkernels.profiler.report.timeline import Timeline
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["figures", "replica_label"]

Figure = dict[str, Any]

_HEIGHT = 300
_ROW_HEIGHT = 34
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


def replica_label(worker: int, replica: int, num_workers: int) -> str:
    """Return the name of a replica on the page."""
    return f"replica {replica}" + (f", worker {worker}" if num_workers > 1 else "")


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
    axes = {"xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False}}
    axes["yaxis"] = {"title": {"text": y}, "automargin": True, "zeroline": False}
    for name, more in layout.items():
        axes[name] = {**axes.get(name, {}), **more} if isinstance(more, dict) else more
    return {"data": data, "layout": {"height": height, **axes}}


def _escaped(texts: Sequence[str]) -> list[str]:
    """Return texts for Plotly, which reads some tags in them."""
    return [html.escape(text) for text in texts]


def _time(found: Analysis) -> Figure:
    times = [each for each in found.times if each.strategy == found.times[0].strategy]
    labels = [replica_label(t.worker, t.replica, len(found.workers)) for t in times]
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
        yaxis={"autorange": "reversed"},
    )  # fmt: skip


def _timeline(table: TraceTable, shown: Timeline) -> Figure:
    lanes = sorted({int(lane) for lane in table.lane[shown.rows]}, key=lambda k: _order(table, k))
    height_of = {lane: row for row, lane in enumerate(lanes)}
    by_kind: dict[str, dict[str, list[Any]]] = {}
    for row, name in zip(shown.rows, shown.names, strict=True):
        category = table.texts[table.category[row]]
        if name.startswith("reduce"):
            category = "update" if "apply_gradients" in name or "Variable." in name else "reduce"
        kind = _KINDS.get(category, _OTHER)
        bars = by_kind.setdefault(kind, {"x": [], "base": [], "y": [], "width": [], "text": []})
        is_range = kind == "ranges"
        bars["x"].append(round(1e3 * table.duration[row], 4))
        bars["base"].append(round(1e3 * (table.begin[row] - shown.begin), 4))
        bars["y"].append(height_of[int(table.lane[row])] + (0.4 if is_range else 0.0))
        bars["width"].append(0.14 if is_range else 0.62)
        bars["text"].append(html.escape(name))
    data = [
        {
            "type": "bar", "orientation": "h", "name": kind, "color": kind, "textposition": "none",
            "hovertemplate": "%{text}: %{x} ms, from %{base} ms<extra>" + kind + "</extra>", **bars,
        }
        for kind in dict.fromkeys([*_KINDS.values(), _OTHER])
        if (bars := by_kind.get(kind)) is not None
    ]  # fmt: skip
    labels = _escaped([_lane_label(table, lane) for lane in lanes])
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
    name = name.removeprefix("dvkernels-")[:28]
    return f"worker {where[0]}, {name}" if len(table.workers) > 1 else name


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
                "type": "scatter", "mode": "lines+markers", "name": html.escape(verb),
                "color": f"series-{number % 6}", "symbol": number,
                "x": [each.nbytes for each in of],
                "y": [float(f"{each.algbw / 1e9:.4g}") for each in of],
                "hovertemplate": "%{x} bytes: %{y} GB/s<extra>" + html.escape(verb) + "</extra>",
            }
        )  # fmt: skip
    return _figure(
        data, "bytes of one replica", "GB/s", xaxis={"type": "log"}, yaxis={"type": "log"}
    )


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
        110 + _ROW_HEIGHT * len(ranking), showlegend=False, yaxis={"autorange": "reversed"},
    )  # fmt: skip


def _memory(found: Analysis) -> Figure:
    several = len(found.workers) > 1
    owners = {owner: k for k, owner in enumerate(dict.fromkeys(m.owner for m in found.memory))}
    data = [
        {
            "type": "scatter", "mode": "lines+markers",
            "name": f"{each.owner}, worker {each.worker}" if several else each.owner,
            "color": f"series-{owners[each.owner] % 6}", "symbol": each.worker,
            "x": [round(second, 4) for second in each.seconds],
            "y": [round(nbytes / 2**20, 3) for nbytes in each.nbytes],
            "hovertemplate": "%{x} s: %{y} MiB<extra>" + html.escape(each.owner) + "</extra>",
        }
        for each in found.memory
    ]  # fmt: skip
    return _figure(data, "s", "MiB", yaxis={"rangemode": "tozero"})
