"""Directive ``{figure-of} NAME``: figures computed from the code that they explain.

They are SVG inside the page, in the colours of its theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from dvkernels.schedules import cost_model, multi_leader, ring
from dvkernels.variables.modes import VariableSynchronization as Mode
from dvkernels.variables.synchronization import SYNC_MODES

_PROGRAMS = Path(__file__).resolve().parents[1] / "explanation" / "data" / "programs.json"


class Drawing:
    """Shapes of an SVG image, in a coordinate system of pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.size = width, height
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, anchor: str = "middle", size: int = 14) -> None:
        """Write text whose baseline is at y."""
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="currentColor">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, text: str, fill: float) -> None:
        """Draw a rectangle with text in its middle; ``fill`` is the opacity of its colour."""
        self.shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" '
            f'fill="var(--pst-color-primary)" fill-opacity="{fill}" stroke="currentColor" '
            f'stroke-opacity="0.4"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, text)

    def line(self, points: list[tuple[float, float]], dash: str = "", opacity: float = 1) -> None:
        """Draw a line through the points."""
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{at}" fill="none" stroke="currentColor" stroke-width="1.6" '
            f'stroke-dasharray="{dash}" stroke-opacity="{opacity}"/>'
        )

    def svg(self, label: str) -> str:
        """Return the image."""
        width, height = self.size
        return (
            f'<svg class="drawn" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
            f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg" '
            f'font-family="inherit">{"".join(self.shapes)}</svg>'
        )


def ring_ticks(num_ranks: int = 4) -> Drawing:
    """Draw which chunk each rank sends in each tick of the ring."""
    ticks = list(ring.all_reduce(num_ranks))
    drawing = Drawing(100 + 90 * num_ranks, 30 + 34 * len(ticks))
    for rank in range(num_ranks):
        drawing.text(145 + 90 * rank, 18, f"{rank} → {(rank + 1) % num_ranks}")
    for row, steps in enumerate(ticks):
        verb = "add" if steps[0].accumulate else "copy"
        drawing.text(90, 50 + 34 * row, f"tick {row}: {verb}", "end")
        for step in steps:
            fill = 0.3 if step.accumulate else 0.08
            x = 105 + 90 * step.source
            drawing.box(x, 30 + 34 * row, 80, 28, f"chunk {step.chunk}", fill)
    return drawing


def levels(hosts: tuple[int, ...] = (0, 0, 1, 1)) -> Drawing:
    """Draw the three levels of an all-reduce between hosts, and the gateways of each part."""
    drawing = Drawing(470, 268)
    names = [f"worker {worker}" for worker in range(len(hosts))]
    rows = (
        "1  reduce in the host's memory",
        "2  send parts to their workers",
        "3  send results back",
    )
    for row, label in enumerate(rows):
        y = 24 + 84 * row
        drawing.text(4, y, label, "start")
        for worker, name in enumerate(names):
            found = multi_leader.roles(hosts, worker)
            parts = ", ".join(map(str, found.parts)) if row != 1 else str(worker)
            text = name if row == 0 else f"part{'s' * (',' in parts)} {parts}"
            drawing.box(
                4 + 115 * worker + 4 * found.host, y + 12, 106, 32, text, 0.1 + 0.2 * found.host
            )
    return drawing


_SAYS = {
    "aggregate_then_write": "aggregate, write all copies",
    "own_copy": "own copy",
    "write_every_copy_alike": "all copies",
    "first_copy": "a copy",
    "write_own_copy": "own copy",
    "write_shares": "shares of, the value",
    "aggregate_copies": "aggregate, of the copies",
    "write_every_copy": "all copies",
    "every_copy": "each copy",
}


def sync_modes() -> Drawing:
    """Draw what a write and a read do in each mode, in a replica and between steps."""
    drawing = Drawing(460, 274)
    modes = (Mode.ON_WRITE, Mode.ON_READ, Mode.NONE)
    rows = (("write", "in a replica"), ("read", "in a replica"), ("write", "outside"))
    for column, mode in enumerate(modes):
        drawing.text(154 + 122 * column, 18, mode.name)
    for row, (verb, where) in enumerate((*rows, ("read", "outside"))):
        drawing.text(4, 50 + 62 * row, verb, "start")
        drawing.text(4, 67 + 62 * row, where, "start")
        for column, mode in enumerate(modes):
            write, _, read, write_across, _, read_across = SYNC_MODES[mode]
            words = _SAYS[(write, read, write_across, read_across)[row].__name__].split(", ")
            x, y = 95 + 122 * column, 28 + 62 * row
            drawing.box(x, y, 118, 54, "", 0.3 if "aggregate" in words[0] else 0.08)
            for k, part in enumerate(words):
                drawing.text(x + 59, y + (31 if len(words) == 1 else 23 + 18 * k), part)
    return drawing


def cost(num_workers: int = 4) -> Drawing:
    """Draw the predicted time of each algorithm between hosts by size."""
    drawing = Drawing(460, 330)
    sizes = [2.0**k for k in range(8, 31)]
    curves: dict[str, list[float]] = {"gather": [], "exchange": [], "ring": []}
    for size in sizes:
        seconds = cost_model.seconds_by_algorithm(
            cost_model.NETWORK, num_workers, num_workers, int(size)
        )
        for name, curve in curves.items():
            curve.append(seconds[name])
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))

    def at(nbytes: float, seconds: float) -> tuple[float, float]:
        x = 64 + 370 * math.log(nbytes / sizes[0]) / math.log(sizes[-1] / sizes[0])
        return x, 280 - 250 * math.log(seconds / low) / math.log(high / low)

    for power, label in ((10, "1 KiB"), (20, "1 MiB"), (30, "1 GiB")):
        x, _ = at(2.0**power, low)
        drawing.line([(x, 30), (x, 280)], opacity=0.2)
        drawing.text(x, 300, label)
    for power, label in enumerate(("10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s"), -5):
        x, y = at(sizes[0], 10.0**power)
        if 30 <= y <= 280:
            drawing.line([(x, y), (434, y)], opacity=0.2)
            drawing.text(58, y + 4, label, "end")
    for row, ((name, curve), dash) in enumerate(
        zip(curves.items(), ("", "6 3", "2 3"), strict=True)
    ):
        drawing.line([at(*point) for point in zip(sizes, curve, strict=True)], dash)
        drawing.line([(84, 44 + 20 * row), (114, 44 + 20 * row)], dash)
        drawing.text(122, 48 + 20 * row, name, "start")
    drawing.text(250, 322, "bytes of the array")
    return drawing


def speed_up() -> Drawing:
    """Draw the measured speed-up of whole programs, beside the possible one."""
    found = json.loads(_PROGRAMS.read_text(encoding="utf-8"))["results"]
    rows = []
    for result in found:
        seconds = {way["name"]: way["seconds"] for way in result["ways"]}
        alone = result["ways"][0]["seconds"]
        if "all cores, no synchronization" in seconds:
            best = alone / seconds["all cores, no synchronization"]
            rows.append((result["program"], alone / seconds["dvkernels"], best))
    drawing = Drawing(460, 34 * len(rows) + 10)
    scale = 300 / max(max(row[1:]) for row in rows)
    for k, (program, ours, best) in enumerate(rows):
        y = 10 + 34 * k
        drawing.text(130, y + 17, program, "end")
        drawing.box(140, y, scale * ours, 24, "", 0.3)
        drawing.line([(140 + scale * best, y - 3), (140 + scale * best, y + 27)])
        drawing.text(148, y + 17, f"{ours:.2f}", "start")
    return drawing


FIGURES: dict[str, tuple[Callable[[], Drawing], str]] = {
    "ring": (ring_ticks, "Chunks that four ranks send to their right-hand neighbours, by tick"),
    "levels": (levels, "Three levels of an all-reduce between two hosts of two workers"),
    "sync-modes": (sync_modes, "What writes and reads of a variable do in each mode"),
    "cost-model": (cost, "Predicted seconds by bytes for gather, exchange and ring"),
    "speed-up": (speed_up, "Speed-up of whole programs over one thread, two cores"),
}


class FigureOf(SphinxDirective):
    """Figure of that name; the content is its caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the figure."""
        draw, label = FIGURES[self.arguments[0]]
        image = nodes.raw("", draw().svg(label), format="html")
        return [nodes.container("", image, *self.parse_content_to_nodes(), classes=["figure-of"])]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("figure-of", FigureOf)
    return {"parallel_read_safe": True}
