"""Measurement of a case: our collective, the memory probe and the peers, in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from dvkernels.benchmarks import c_probe
from dvkernels.benchmarks.cases import Case
from dvkernels.benchmarks.probe import Probe
from dvkernels.benchmarks.stopwatch import Samples, alternate, ratio, timed
from dvkernels.errors import WorkerLostError
from dvkernels.reduce_op import ReduceOp

__all__ = ["Answer", "Measurement", "Peer", "measure", "numpy_all_reduce"]

# A round takes at least this long, so that a clock of 50 ns and a call of 1 us do not matter.
_ROUND_SECONDS = 2e-3
_MOST_ITERATIONS = 2000
_REST_SECONDS = 0.02


class Answer(NamedTuple):
    """A peer's answer to one command."""

    seconds: float
    wrong: int
    note: str


class Peer(Protocol):
    """Another library that is measured in the same run."""

    def ask(self, count: int, dtype: str, iterations: int) -> Answer:
        """Measure all-reduces of ``count`` elements; the answer has the seconds per call."""

    def close(self) -> None:
        """End its processes."""


class Measurement(NamedTuple):
    """Times of our collective, the probe and each peer, and the numbers of wrong elements."""

    case: Case
    ours: Samples
    probe: Samples
    wrong: int
    peers: Mapping[str, Samples]
    wrong_of_peers: Mapping[str, int]
    lost_peers: Mapping[str, str]
    in_c: Samples | None = None  # the same all-reduce in C

    @property
    def attained_of_c(self) -> float | None:
        """The fraction of the speed of the all-reduce in C; None where that was not measured."""
        return None if self.in_c is None else ratio(self.in_c, self.ours)

    @property
    def attained(self) -> float:
        """The fraction of the probe's speed that our collective reaches."""
        return ratio(self.probe, self.ours)

    def as_record(self) -> dict[str, Any]:
        """Return the measurement as plain JSON values."""
        case = self.case
        algbw, busbw = case.rates(self.ours.median)
        low, high = self.ours.quartiles
        return {
            "collective": case.collective,
            "nbytes": case.count * case.dtype.itemsize,
            "count": case.count,
            "dtype": case.dtype.name,
            "op": case.op.value,
            "replicas": case.num_replicas,
            "algorithm": case.algorithm,
            "seconds": self.ours.median,
            "seconds_quartiles": [low, high],
            "algbw_GBps": algbw,
            "busbw_GBps": busbw,
            "moved_bytes": case.moved,
            "probe_seconds": self.probe.median,
            "attained": self.attained,
            "c_seconds": None if self.in_c is None else self.in_c.median,
            "attained_of_c": self.attained_of_c,
            "wrong": self.wrong,
            "peers": {
                name: {
                    "seconds": samples.median,
                    "seconds_quartiles": list(samples.quartiles),
                    "times_ours": ratio(samples, self.ours),
                    "wrong": self.wrong_of_peers.get(name, 0),
                }
                for name, samples in self.peers.items()
            },
            "lost_peers": dict(self.lost_peers),
        }


def numpy_all_reduce(buffers: list[Any]) -> None:
    """All-reduce by NumPy on one thread: ``add(out=)``, then ``copyto``."""
    total, *others = buffers
    for buffer in others:
        np.add(total, buffer, out=total)
    for buffer in others:
        np.copyto(buffer, total)


def measure(
    case: Case,
    num_rounds: int,
    seed: int,
    workers: Mapping[str, Peer] | None = None,
    with_numpy: bool = False,
) -> Measurement:
    """Check a case on random data, then time it, its probe and its peers."""
    wrong = case.wrong_elements(seed)
    original = case.steady_buffers(seed)
    buffers = [buffer.copy() for buffer in original]
    call, outs = case.caller(buffers)
    probe = Probe(*case.probed(buffers, outs), case.moved)

    def renew() -> None:
        for buffer, source in zip(buffers, original, strict=True):
            np.copyto(buffer, source)

    def timer_of(call: Callable[[], Any]) -> Callable[[], float]:
        renew()
        iterations = _iterations(timed(call, 3, renew, case.most_repeats))
        return lambda: timed(call, iterations, renew, case.most_repeats)

    ours = timer_of(call)
    passes = _iterations(probe.seconds(1))
    timers: dict[str, Callable[[], float]] = {
        "ours": ours,
        "probe": lambda: probe.seconds(passes),
    }
    is_all_reduce = case.collective == "all_reduce"
    if is_all_reduce and not c_probe.reason_for_none() and c_probe.is_supported(buffers):
        in_c = c_probe.CProbe(buffers)
        timers["probe"] = lambda: min(probe.seconds(passes), in_c.seconds(passes, True))
        if case.dtype == np.float32 and case.op in (ReduceOp.SUM, ReduceOp.MEAN):
            timers["c"] = _renewed(renew, lambda: in_c.seconds(passes, False))
    wrong_of_peers: dict[str, int] = {}
    lost: dict[str, str] = {}
    peers_support_it = is_all_reduce and case.op.value == "sum"
    if peers_support_it and with_numpy:
        timers["numpy"] = timer_of(lambda: numpy_all_reduce(buffers))
    for name, worker in (workers or {}).items() if peers_support_it else ():
        try:
            worker.ask(case.count, case.dtype.name, 1)  # compiles, connects
            first = worker.ask(case.count, case.dtype.name, 3)
        except WorkerLostError as error:
            lost[name] = str(error)
            continue
        wrong_of_peers[name] = first.wrong
        timers[name] = _peer_timer(worker, case, _iterations(first.seconds))
    found = alternate(timers, num_rounds, _REST_SECONDS if workers else 0.0)
    our_samples, probe_samples = found.pop("ours"), found.pop("probe")
    in_c_samples = found.pop("c", None)
    return Measurement(
        case, our_samples, probe_samples, wrong, found, wrong_of_peers, lost, in_c_samples
    )


def _renewed(renew: Callable[[], None], timer: Callable[[], float]) -> Callable[[], float]:
    def seconds() -> float:
        renew()
        return timer()

    return seconds


def _peer_timer(worker: Peer, case: Case, iterations: int) -> Callable[[], float]:
    return lambda: worker.ask(case.count, case.dtype.name, iterations).seconds


def _iterations(seconds: float) -> int:
    return max(1, min(_MOST_ITERATIONS, round(_ROUND_SECONDS / max(seconds, 1e-7))))
