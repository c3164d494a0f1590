"""``python -m dvkernels bench``: speed of the collectives, beside the memory limit and NumPy."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dvkernels._version import __version__
from dvkernels.cli import argument_types, output_paths
from dvkernels.cluster.resolvers import default_resolver
from dvkernels.devices import cpu
from dvkernels.errors import AlgorithmError, BufferMismatchError

if TYPE_CHECKING:
    from dvkernels.benchmarks.between_gpus import Library
    from dvkernels.benchmarks.measurement import Peer

__all__: list[str] = []

HELP = "measure collectives by size, compared with the memory limit and NumPy"
EXAMPLES = (
    ("all_reduce, 4 B to 256 MiB", "python -m dvkernels bench"),
    ("beside NumPy, as a plot", "python -m dvkernels bench --peers numpy --plot curves.svg"),
    ("others", "python -m dvkernels bench broadcast all_gather --sizes 1M:64M --replicas 4"),
    ("all measurements of GPUs", "python -m dvkernels bench --device cuda --report gpu.json"),
)

_SUFFIXES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DEFAULT_SIZES = "4:256M"


# Given the options and the stack that ends them, starts the chosen peers, and returns them and a
# note for each.
StartPeers = Callable[
    [argparse.Namespace, contextlib.ExitStack], tuple[Mapping[str, "Peer"], dict[str, str]]
]


def _only_numpy(
    arguments: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Mapping[str, Peer], dict[str, str]]:
    for name in arguments.peers:
        if name != "numpy":
            raise AlgorithmError(
                f"bench: expected --peers numpy, got {name!r}; other libraries are measured from a "
                f"clone: cd asv_benchmarks && python -m peers bench --peers {name}"
            )
    return {}, {}


class OtherLibraries(NamedTuple):
    """Libraries that are measured beside ours; by default NumPy, and NCCL between GPUs."""

    program: str = "python -m dvkernels"  # which measures them
    start: StartPeers = _only_numpy
    between_gpus: Mapping[str, Library] | None = None


def add_arguments(parser: argparse.ArgumentParser, peers: str = "numpy") -> None:
    """Declare the options."""
    parser.add_argument(
        "collectives",
        nargs="*",
        metavar="COLLECTIVE",
        help="all_reduce (default), broadcast, reduce, reduce_scatter, all_gather, all_to_all",
    )
    parser.add_argument(
        "--sizes",
        default=_DEFAULT_SIZES,
        metavar="MIN:MAX | A,B,...",
        help="bytes of one replica's buffer; K, M, G are powers of 1024 (default 4:256M)",
    )
    parser.add_argument(
        "--factor", type=argument_types.integer, default=4, help="ratio of successive sizes"
    )
    parser.add_argument("--dtype", default="float32", help="element type")
    parser.add_argument("--op", default="sum", help="sum, mean, min, max or prod")
    parser.add_argument(
        "--replicas", type=argument_types.integer, default=2, help="number of buffers"
    )
    parser.add_argument("--algorithm", default="auto", help="auto, direct or ring")
    parser.add_argument(
        "--rounds", type=argument_types.integer, default=9, help="alternating rounds"
    )
    parser.add_argument(
        "--seed", type=argument_types.natural, default=0, help="seed of the elements"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        help=f"libraries to measure in the same run: {peers}; all that are installed if none is "
        "named",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: run all GPU benchmarks; of the other options only --rounds and --json apply",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="with --device cuda: write JSON here, and a page (.md)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one JSON object to a file; without FILE, or to -, instead of lines of text",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the constants of the cost model, print them and end; on several workers "
        "(python -m dvkernels launch -n 2 -m dvkernels bench --calibrate) those between workers, "
        "on several hosts also those of the network, and the variable to set; --json FILE gets "
        "every measured time",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 if any element was wrong."""
    return measure(arguments, OtherLibraries())


def measure(arguments: argparse.Namespace, others: OtherLibraries) -> int:
    """Measure and print; return 1 if any element was wrong or a peer was lost."""
    if arguments.device == "cuda":
        from dvkernels.cli import bench_gpu

        return bench_gpu.run(arguments, others.program, others.between_gpus)
    if arguments.calibrate:
        return _calibrate(arguments, others.program)
    # Imported here: loads Numba and compiled kernels, which wrong options need not wait for.
    from dvkernels.benchmarks import available_memory, cases, measurement, report

    collectives = arguments.collectives or ["all_reduce"]
    if arguments.rounds < 1:
        raise BufferMismatchError(f"bench: expected at least 1 round; got {arguments.rounds}")
    chosen_cases = [
        cases.case(
            name, nbytes, arguments.dtype, arguments.op, arguments.replicas, arguments.algorithm
        )
        for name in collectives
        for nbytes in _sizes(arguments.sizes, arguments.factor)
    ]
    plot_path = None if arguments.plot is None else output_paths.plot(arguments.plot)
    json_output = output_paths.JsonOutput(arguments.json)
    quiet = json_output.is_stdout
    about = _about(arguments, others.program)
    limit = available_memory.available_nbytes() // 2
    records: list[dict[str, Any]] = []
    measurements: list[measurement.Measurement] = []
    with contextlib.ExitStack() as stack:
        with_numpy = arguments.peers is not None and "numpy" in (arguments.peers or ["numpy"])
        notes = {"numpy": f"numpy {metadata.version('numpy')}, one thread"} if with_numpy else {}
        workers: dict[str, Peer] = {}
        if arguments.peers is not None:
            started, started_notes = others.start(arguments, stack)
            workers.update(started)
            notes.update(started_notes)
        about["peers"] = notes
        columns = (["numpy"] if with_numpy else []) + list(workers)
        if not quiet:
            for line in _heading(about):
                print(f"# {line}")
        previous = None
        for case in chosen_cases:
            if not quiet and case.collective != previous:
                previous = case.collective
                print(
                    f"# {case.collective}, {argument_types.counted(case.num_replicas, 'replica')}"
                )
                print(report.header(columns))
            if case.footprint > limit:
                note = f"{case.nbytes} bytes left out: it needs {case.footprint >> 20} MiB"
                records.append({"collective": case.collective, "left_out": note})
                print(f"# {note}", file=sys.stderr if quiet else sys.stdout)
                continue
            measured = measurement.measure(
                case, arguments.rounds, arguments.seed, workers, with_numpy
            )
            measurements.append(measured)
            records.append(measured.as_record())
            if not quiet:
                print(report.line(measured, columns), flush=True)
            for name, reason in measured.lost_peers.items():
                print(f"# {reason}", file=sys.stderr if quiet else sys.stdout)
                workers.pop(name).close()
    wrong = sum(each.wrong + sum(each.wrong_of_peers.values()) for each in measurements)
    lost = sum(len(each.lost_peers) for each in measurements)
    if not quiet:
        print(f"# errors: {wrong} wrong elements, {lost} peers lost")
    json_output.write({**about, "results": records, "wrong": wrong})
    if plot_path is not None:
        _draw(measurements, plot_path, about)
    return 1 if wrong or lost else 0


def _calibrate(arguments: argparse.Namespace, program: str) -> int:
    """Measure the cost model of this machine, or between the workers of this job."""
    from dvkernels.benchmarks import calibration, network_calibration

    resolver = default_resolver()
    json_output = output_paths.JsonOutput(arguments.json if resolver.is_chief else None)
    if resolver.num_workers > 1:
        between = network_calibration.calibrate(resolver, arguments.rounds)
        text = network_calibration.describe(between)
        record = network_calibration.as_record(between)
    else:
        machine = calibration.calibrate(arguments.rounds)
        text, record = calibration.describe(machine), {"constants": machine._asdict()}
    if resolver.is_chief:
        if not json_output.is_stdout:
            print(text)
        json_output.write({**_about(arguments, program), **record})
    return 0


def _sizes(text: str, factor: int) -> list[int]:
    """Parse sizes in bytes: a geometric range ``4:256M`` or a list ``1K,64K``."""
    if ":" not in text:
        return [_nbytes(part) for part in text.split(",")]
    first, _, last = text.partition(":")
    low, high = _nbytes(first), _nbytes(last)
    if factor < 2 or low > high:
        raise BufferMismatchError(
            f"bench: expected --sizes MIN:MAX with MIN <= MAX and --factor of at least 2; got "
            f"{text!r} and {factor}"
        )
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return sizes


def _nbytes(text: str) -> int:
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    suffix = digits[-1:] if digits[-1:] in ("K", "M", "G") else ""
    number = digits.removesuffix(suffix)
    if not number.isdecimal() or int(number) < 1:
        raise BufferMismatchError(f"bench: expected a size such as 4, 64K or 256M; got {text!r}")
    return int(number) * _SUFFIXES[suffix]


def _about(arguments: argparse.Namespace, program: str) -> dict[str, Any]:
    from dvkernels.benchmarks import c_probe

    packages = ("numpy", "numba", "llvmlite")
    return {
        "dvkernels": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {cpu.usable_cores()} usable cores, {platform.system()} "
        f"{platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "command": f"{program} bench " + " ".join(_without_paths(sys.argv)),
        "rounds": arguments.rounds,
        "c_probe": c_probe.describe(),
    }


def _without_paths(argv: Sequence[str]) -> list[str]:
    """Return the options as given, without the paths of this machine."""
    options = list(argv[2:]) if len(argv) > 1 and argv[1] == "bench" else []
    return [
        f"{option.partition('=')[0]}=PATH" if "=" in option and "/" in option else option
        for option in options
    ]


def _heading(about: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        f"dvkernels {about['dvkernels']}, {about['date']}, {about['machine']}",
        f"Python {about['python']}, {packages}; {about['rounds']} alternating rounds, medians",
        "probe: the fastest pass that only touches, and the fraction of its rate that was reached",
        f"C: the fraction of the rate of the same float32 all-reduce in C ({about['c_probe']})",
    ]
    return lines + [f"{name}: {note}" for name, note in about["peers"].items()]


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _draw(measurements: Sequence[Any], path: Path, about: dict[str, Any]) -> None:
    """Draw one plot for each collective."""
    from dvkernels.benchmarks import plot

    names = list(dict.fromkeys(each.case.collective for each in measurements))
    for name in names:
        chosen = [each for each in measurements if each.case.collective == name]
        case = chosen[0].case
        target = path.with_stem(f"{path.stem}-{name}") if len(names) > 1 else path
        title = (
            f"{name} {case.op.value} {case.dtype.name}, "
            f"{argument_types.counted(case.num_replicas, 'replica')}: {about['machine']}, "
            f"{about['date'][:10]}"
        )
        plot.draw(chosen, target, title)
