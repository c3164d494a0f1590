"""``python -m dvkernels report``: where the time of a traced program goes, and what to change."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dvkernels.cli import argument_types, output_paths

if TYPE_CHECKING:
    from dvkernels.profiler.report.analysis import Analysis
    from dvkernels.profiler.report.trace_table import TraceTable

__all__: list[str] = []

HELP = "analyse a trace: where the time goes, who is late, and which setting to change"
EXAMPLES = (
    ("a summary", "python -m dvkernels report run.json"),
    ("a page", "python -m dvkernels report run.json -o report.html"),
    ("of all workers", "python -m dvkernels report run.worker-*.json -o report.html"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files."""
    parser.add_argument(
        "files", nargs="+", metavar="TRACE",
        help="a trace, or those of all workers of a job, such as run.worker-0.json",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="write a page, such as report.html, that needs no network (default: only a summary)",
    )  # fmt: skip
    argument_types.add_json(parser, "the whole analysis")


def run(arguments: argparse.Namespace) -> int:
    """Analyse the trace, print what it says, and write the page."""
    from dvkernels.profiler.report import analysis, page, trace_table

    if arguments.output is not None:
        page.check()
        output_paths.file("--output", arguments.output)
    table = _read(arguments.files)
    found = analysis.analyse(table)
    if arguments.output is not None:
        # The title is the name of the trace without its worker.
        name = Path(arguments.files[0]).name.partition(".worker-")[0].removesuffix(".json")
        page.write(arguments.output, trace_table.printable(name), table, found)
    print(json.dumps(found.as_json()) if arguments.json else "\n".join(_lines(found)))
    return 0


def _read(files: list[str]) -> TraceTable:
    from dvkernels.profiler import trace_merge
    from dvkernels.profiler.report import trace_table

    if len(files) == 1:
        return trace_table.read(files[0])
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged.json"
        trace_merge.merge(files, merged)
        return trace_table.read(merged)


def _lines(found: Analysis) -> Iterator[str]:
    for each in found.times:
        steps = f"{each.num_steps} steps, {1e3 * each.total / each.num_steps:.3f} ms each"
        parts = ", ".join(f"{part} {100 * each.share(part):.0f} %" for part in each.seconds)
        yield f"{each.strategy}, worker {each.worker}, replica {each.replica}: {steps}: {parts}"
    for late in found.lateness[:1]:
        part = 100 * late.num_last / late.num_meetings
        yield (
            f"last of all comes most often replica {late.replica}: to {part:.0f} % of "
            f"{late.num_meetings} collectives; the others waited {late.waited_seconds:.3f} s for it"
        )
    for advice in found.advice:
        yield f"{advice.problem}: {advice.sentence} {advice.change} See docs/{advice.page}.md."
    if not found.advice:
        yield "advice: none, no rule found a problem"
