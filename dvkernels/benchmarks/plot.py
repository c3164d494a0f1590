"""Bus bandwidth by size as a figure, with matplotlib."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from dvkernels.benchmarks import sizes
from dvkernels.benchmarks.contest import Row
from dvkernels.benchmarks.failures import BenchmarkError, MissingPackageError

__all__: list[str] = []

_FORMATS = ("png", "svg", "pdf")


def check(path: Path) -> None:
    """Raise now what would else be raised when everything has been measured."""
    if path.suffix[1:].lower() not in _FORMATS:
        raise BenchmarkError(f"--plot takes a file that ends in {', '.join(_FORMATS)}, got {path}")
    check_writable(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "--plot needs the package matplotlib; install the plot extra: "
            "python -m pip install 'dvkernels[plot]'"
        )


def check_writable(path: Path) -> None:
    """Raise unless a file can be written there; none is."""
    folder = path.parent
    writable = os.access(path if path.exists() else folder, os.W_OK)
    if path.is_dir() or not folder.is_dir() or not writable:
        raise BenchmarkError(f"cannot write {path}: choose a file in a folder that you may write")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw one panel per collective and one line per contestant, quartiles shaded."""
    from matplotlib.figure import Figure

    collectives = list(dict.fromkeys(row.case.collective for row in rows))
    figure = Figure(figsize=(7, 4.2 * len(collectives)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    for number, collective in enumerate(collectives, start=1):
        axes = figure.add_subplot(len(collectives), 1, number)
        own = [row for row in rows if row.case.collective == collective]
        for name in dict.fromkeys(row.contestant for row in own):
            line = [row for row in own if row.contestant == name]
            x = [row.case.nbytes for row in line]
            scale = [row.busbw * row.timing.median for row in line]  # GB moved over the bus
            axes.plot(x, [row.busbw for row in line], marker="o", markersize=3, label=name)
            axes.fill_between(
                x,
                [gb / row.timing.quartiles[1] for gb, row in zip(scale, line, strict=True)],
                [gb / row.timing.quartiles[0] for gb, row in zip(scale, line, strict=True)],
                alpha=0.2,
            )
        ticks = sorted({row.case.nbytes for row in own})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [sizes.spell(tick) for tick in ticks])
        axes.set_xlabel("bytes of one buffer")
        axes.set_ylabel("bus bandwidth, GB/s")
        axes.set_title(f"{collective}, {own[0].case.num_replicas} replicas")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
