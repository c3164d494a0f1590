"""``python -m dvkernels bench --device cuda``: all benchmarks of a GPU in one command."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dvkernels._version import __version__
from dvkernels.cli import output_paths
from dvkernels.devices import cuda, driver
from dvkernels.profiler import atomic_file

if TYPE_CHECKING:
    from dvkernels.benchmarks.between_gpus import Library

__all__: list[str] = []

_SIMULATED = {"nbytes": 256, "small_nbytes": 16, "rounds": 1, "calls": 1, "small_calls": 1}


def run(
    arguments: argparse.Namespace, program: str, libraries: Mapping[str, Library] | None
) -> int:
    """Measure, print a page fragment, and write the data and the page to files."""
    cuda.require("bench --device cuda")
    from dvkernels.benchmarks import between_gpus, gpu

    report = None if arguments.report is None else output_paths.file("--report", arguments.report)
    if report is not None:
        output_paths.file("--report", str(report.with_suffix(".md")))
    json_output = output_paths.JsonOutput(arguments.json)
    plan = (
        gpu.MeasurementPlan(**_SIMULATED)  # type: ignore[arg-type]
        if cuda.is_simulated()
        else gpu.MeasurementPlan(rounds=arguments.rounds)
    )
    found = driver.find()
    name = "Numba's simulator: its times mean nothing"
    if not cuda.is_simulated() and found is not None:
        version = ".".join(map(str, found.version()))
        name = f"{found.name(0)}, driver for CUDA {version}"
    about = {
        "Machine": f"{name}; {platform.platform()}",
        "Date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "Version": f"dvkernels {__version__}, Python {platform.python_version()}",
        "Command": " ".join([program, *sys.argv[1:]]),
        "Rounds": f"{plan.rounds} of {plan.calls} calls, in turn; medians and quartiles",
    }
    figures = gpu.measure(plan=plan)
    libraries = between_gpus.LIBRARIES if libraries is None else libraries
    figures += between_gpus.measure([device.index for device in cuda.devices()], plan, libraries)
    fragment = gpu.page(figures, about)
    if not json_output.is_stdout:
        print(fragment, end="")
    data = {"about": about, "figures": [figure._asdict() for figure in figures]}
    json_output.write(data)
    if report is not None:
        atomic_file.write_text(report, json.dumps(data, indent=1) + "\n")
        atomic_file.write_text(report.with_suffix(".md"), fragment)
    return 0
