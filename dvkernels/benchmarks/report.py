"""Text table of measurements, with the columns of nccl-tests."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.benchmarks.measurement import Measurement
from dvkernels.benchmarks.stopwatch import ratio

__all__ = ["header", "line"]

_COLUMNS = (
    ("size", 12), ("count", 11), ("type", 10), ("op", 5), ("alg", 7), ("time", 11),
    ("quartiles", 21), ("algbw", 8), ("busbw", 8), ("probe", 6), ("C", 6), ("#wrong", 7),
)  # fmt: skip
_UNITS = ("(B)", "(elements)", "", "", "", "(us)", "(us)", "(GB/s)", "(GB/s)", "", "", "")


def header(peers: Sequence[str]) -> str:
    """Return the two header lines, names and units; a peer's column has its time and the ratio."""
    names = [name.rjust(width) for name, width in _COLUMNS] + [peer.rjust(19) for peer in peers]
    units = [unit.rjust(width) for unit, (_, width) in zip(_UNITS, _COLUMNS, strict=True)]
    units += ["(us)      / ours".rjust(19) for _ in peers]
    return "# " + " ".join(names) + "\n# " + " ".join(units)


def line(found: Measurement, peers: Sequence[str]) -> str:
    """Return the line of one measurement."""
    case = found.case
    algbw, busbw = case.rates(found.ours.median)
    low, high = (1e6 * seconds for seconds in found.ours.quartiles)
    cells = (
        f"{case.count * case.dtype.itemsize}", f"{case.count}", case.dtype.name, case.op.value,
        case.algorithm, f"{1e6 * found.ours.median:.2f}", f"{low:.2f} to {high:.2f}",
        f"{algbw:.3f}", f"{busbw:.3f}", f"{found.attained:.2f}",
        "-" if found.attained_of_c is None else f"{found.attained_of_c:.2f}", f"{found.wrong}",
    )  # fmt: skip
    texts = [cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True)]
    for peer in peers:
        samples = found.peers.get(peer)
        if samples is None:
            texts.append(("lost" if peer in found.lost_peers else "-").rjust(19))
            continue
        times = ratio(samples, found.ours)
        mark = " WRONG" if found.wrong_of_peers.get(peer) else ""
        texts.append(f"{1e6 * samples.median:.2f} {times:8.2f}{mark}".rjust(19))
    return "  " + " ".join(texts)
