"""Page of a report: one HTML file that loads nothing, by Jinja2 and Plotly."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from dvkernels._version import __version__
from dvkernels.errors import DvKernelsError
from dvkernels.profiler import atomic_file, memory_report
from dvkernels.profiler.report import arrivals, figures, timeline
from dvkernels.profiler.report.analysis import Analysis
from dvkernels.profiler.report.time_split import PARTS
from dvkernels.profiler.report.trace_table import TraceTable

__all__ = ["MissingReportPackageError", "check", "write"]

_HERE = Path(__file__).parent
_TEMPLATE = "page.html.jinja"


class MissingReportPackageError(DvKernelsError, ImportError):
    """A package of the extra ``report`` is not installed."""


def check() -> None:
    """Raise if a package that the page needs is missing."""
    _package("jinja2")
    _package("plotly")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingReportPackageError(
            f"the page of a report needs {name.split('.')[0]} ({error}): "
            f"pip install 'dvkernels[report]'"
        ) from None


def write(path: str | os.PathLike[str], title: str, table: TraceTable, found: Analysis) -> None:
    """Write the page of a trace; an existing file is replaced at the end, or stays as it is.

    Raises
    ------
    MissingReportPackageError
        Jinja2 or Plotly is not installed.
    OSError
        The file cannot be written.
    """
    atomic_file.write_text(path, text(title, table, found))


def text(title: str, table: TraceTable, found: Analysis) -> str:
    """Return the text of the page."""
    jinja2 = _package("jinja2")
    script = _package("plotly.offline").get_plotlyjs()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "ms": figures.milliseconds_text,
        "percent": lambda share: f"{100 * share:.1f}",
        "size": memory_report.size_text,
    }
    main = found.times[0].strategy if found.times else ""
    shown = timeline.timeline(table, main, arrivals.meetings(table))
    drawn = figures.figures(table, found, shown)
    page: str = environment.get_template(_TEMPLATE).render(
        title=title, found=found, shown=shown, parts=PARTS, drawn=drawn, version=__version__,
        main=main, others=_others(found),
        style=_file("page.css"), script=_file("page.js"), plotly=script, data=_in_script(drawn),
    )  # fmt: skip
    return page


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _in_script(data: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    encoded = json.dumps(data, allow_nan=False)
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _others(found: Analysis) -> str:
    """Say what other programs took of the cores."""
    shares = [
        f"{100 * each.share_of_other_programs:.0f} %"
        + (f" on worker {each.worker}" if len(found.workers) > 1 else "")
        for each in found.workers
        if each.share_of_other_programs is not None
    ]
    if not shares:
        return "What other programs took of the cores is not known: the trace is too short."
    who = "Other programs" + (", and other workers," if len(found.workers) > 1 else "")
    return f"{who} took {', '.join(shares)} of the time of the cores."
