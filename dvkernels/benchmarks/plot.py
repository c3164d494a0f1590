"""Plots: bandwidth and time of a collective by size; loss and time per step of a training."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvkernels.benchmarks.measurement import Measurement
from dvkernels.errors import DvKernelsError
from dvkernels.profiler.atomic_file import AtomicFile

__all__ = ["FormatError", "MissingPackageError", "check", "draw", "draw_training"]


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
            f"--plot: {path.name!r} must end in the name of a format, such as .svg; known "
            f"are {', '.join(known)}"
        )


def _matplotlib(name: str) -> Any:
    try:
        importlib.import_module("matplotlib").use("agg")
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            "--plot needs matplotlib: pip install 'dvkernels[plot]'"
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
    _save(figure, path, title)


def draw_training(
    losses: Mapping[str, tuple[int, Sequence[float]]],
    seconds: Mapping[str, Mapping[str, float] | None],
    path: Path,
    title: str,
) -> None:
    """Draw the losses of trainings from their first steps on, and the time per step by part."""
    pyplot = _matplotlib("matplotlib.pyplot")
    figure, (loss, time) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (name, (first, values)), style in zip(losses.items(), ("-", "--"), strict=True):
        loss.plot(range(first, first + len(values)), values, style, label=name, linewidth=1)
    loss.set_yscale("log")
    loss.set_xlabel("step")
    loss.set_ylabel("loss")
    loss.legend(fontsize=8)
    measured = {name: parts for name, parts in seconds.items() if parts}
    lefts = dict.fromkeys(measured, 0.0)
    for part in next(iter(measured.values()), {}):
        widths = {name: 1e3 * parts[part] for name, parts in measured.items()}
        time.barh([*widths], [*widths.values()], left=[*lefts.values()], label=part)
        lefts = {name: lefts[name] + width for name, width in widths.items()}
    time.set_xlabel("time per step (ms)")
    if measured:
        time.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5)
    for axes in (loss, time):
        axes.grid(alpha=0.3)
    _save(figure, path, title)


def _save(figure: Any, path: Path, title: str) -> None:
    """Write a figure to a file whose suffix names the format."""
    figure.suptitle(title, fontsize=10)
    kind = path.suffix.removeprefix(".") or "png"
    metadata = {"Date": None} if kind == "svg" else None
    AtomicFile(path).fill(lambda file: figure.savefig(file, format=kind, metadata=metadata))
    _matplotlib("matplotlib.pyplot").close(figure)
