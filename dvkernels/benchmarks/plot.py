"""Plot of a benchmark: bandwidth and time by size, of our collective, the probe and the peers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvkernels.benchmarks.measurement import Measurement
from dvkernels.errors import DvKernelsError
from dvkernels.profiler.atomic_file import AtomicFile

__all__ = ["FormatError", "MissingPackageError", "check", "draw"]


class MissingPackageError(DvKernelsError, ImportError):
    """A package that an option needs is not installed."""


class FormatError(DvKernelsError, ValueError):
    """The suffix of a plot file names no format that matplotlib can write."""


def check(path: Path) -> None:
    """Raise if matplotlib is missing, or cannot write the format that the suffix names."""
    figure: Any = _matplotlib("matplotlib.figure").Figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise FormatError(
            f"bench --plot: {path.name!r} must end in the name of a format, such as .svg; known "
            f"are {', '.join(known)}"
        )


def _matplotlib(name: str) -> Any:
    try:
        importlib.import_module("matplotlib").use("agg")
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            "bench --plot needs matplotlib: pip install 'dvkernels[plot]'"
        ) from None


def draw(measurements: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw one collective's measurements to a file whose suffix names the format."""
    pyplot = _matplotlib("matplotlib.pyplot")
    sizes = [found.case.count * found.case.dtype.itemsize for found in measurements]
    figure, (rate, time) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    curves: dict[str, list[tuple[int, float]]] = {"dvkernels": [], "probe (limit)": []}
    for size, found in zip(sizes, measurements, strict=True):
        curves["dvkernels"].append((size, found.ours.median))
        curves["probe (limit)"].append((size, found.probe.median))
        for name, samples in found.peers.items():
            curves.setdefault(name, []).append((size, samples.median))
    for name, points in curves.items():
        style = {"dvkernels": "-o", "probe (limit)": "k--"}.get(name, "-")
        xs, ys = [x for x, _ in points], [y for _, y in points]
        gbps = [x / y / 1e9 for x, y in points]
        rate.plot(xs, gbps, style, label=name, markersize=3)
        time.plot(xs, [1e6 * y for y in ys], style, label=name, markersize=3)
    for axes, label in ((rate, "algbw (GB/s)"), (time, "time (us)")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes per replica")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    time.set_yscale("log")
    rate.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    kind = path.suffix.removeprefix(".") or "png"
    metadata = {"Date": None} if kind == "svg" else None
    AtomicFile(path).fill(lambda file: figure.savefig(file, format=kind, metadata=metadata))
    pyplot.close(figure)
