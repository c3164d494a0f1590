"""One case, by this library, by the memory probe and by the peers, in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dvkernels.benchmarks import cases
from dvkernels.benchmarks.cases import Arrays, Case, Trial
from dvkernels.benchmarks.failures import ContestantLostError
from dvkernels.benchmarks.peers import numpy_loop, registry
from dvkernels.benchmarks.peers.worker import Worker
from dvkernels.benchmarks.probe import Probe
from dvkernels.benchmarks.stopwatch import Contestant, Timing, alternate

__all__: list[str] = []

OURS = "dvkernels"


@dataclass(frozen=True)
class Row:
    """What one contestant did in one case."""

    case: Case
    contestant: str
    variant: str  # which of several ways of it was the fastest
    timing: Timing
    attained: float  # of the rate of the faster probe
    times_ours: float  # its time over ours, round by round
    wrong: int

    @property
    def algbw(self) -> float:
        """Bytes of one buffer over the time, in GB/s."""
        return self.case.nbytes / self.timing.median / 1e9

    @property
    def busbw(self) -> float:
        """What does not depend on the number of replicas where the bus is the limit, in GB/s."""
        return self.algbw * self.case.bus_factor


@dataclass(frozen=True)
class Absence:
    """A peer that does not take part, or stopped to."""

    peer: str
    reason: str
    remedy: str = ""


def measure(
    case: Case,
    contestants: Mapping[str, Contestant],
    num_rounds: int,
    batch_seconds: float = 2e-3,
) -> tuple[dict[str, Timing], dict[str, float], dict[str, ContestantLostError]]:
    """Time contestants beside the probe.

    Returns
    -------
    timings : dict
        By contestant; those that are not there were lost.
    attained : dict
        By contestant, the part of the faster probe's rate that its own is.
    lost : dict
        By contestant, why.
    """
    with Probe(case.num_replicas, case.touched_bytes) as probe:
        probes = probe.contestants()
        timings, lost = alternate({**contestants, **probes}, num_rounds, batch_seconds)
        limit = min((timings[name] for name in probes), key=lambda timing: timing.median)
        share = case.moved_bytes / probe.moved_bytes
    found = {name: timing for name, timing in timings.items() if name not in probes}
    attained = {name: share * limit.over(timing) for name, timing in found.items()}
    return found, attained, lost


class Contest:
    """The peers that are here, running until it is closed, and the rounds."""

    def __init__(
        self,
        peers: Sequence[str],
        interpreters: Mapping[str, str],
        num_replicas: int,
        num_rounds: int,
        timeout: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._num_rounds = num_rounds
        self._has_numpy = "numpy" in peers
        self._workers: dict[str, Worker] = {}
        self.skipped: list[Absence] = []
        self.failures: list[Absence] = []
        self.versions: dict[str, str] = {}
        try:
            for name in peers:
                if name == "numpy":  # in this process
                    self.versions[name] = f"NumPy {np.__version__}"
                    continue
                say(f"starting {name}")
                try:
                    worker = registry.start(name, interpreters.get(name), num_replicas, timeout)
                except ContestantLostError as error:
                    self.skipped.append(Absence(name, str(error), registry.remedy(name)))
                    continue
                self._workers[name] = worker
                self.versions[name] = str(worker.ready["version"])
        except BaseException:
            self.close()
            raise

    def rows(self, case: Case) -> list[Row]:
        """Check and time every contestant of one case; ours comes first."""
        arrays = Arrays(case)
        trials = {OURS: Trial(arrays, cases.ours(arrays))}
        if self._has_numpy:
            trials["numpy"] = Trial(arrays, numpy_loop.call(arrays))
        wrong = {name: trial.num_wrong() for name, trial in trials.items()}
        contestants = {name: Contestant(t.run, t.max_calls) for name, t in trials.items()}
        owners = {name: (name, "") for name in trials}

        workers = dict(self._workers) if registry.offers(case) else {}
        for name, worker in workers.items():
            try:
                wrong.update(self._prepare(worker, case))
            except ContestantLostError as error:
                self._lose(name, error)
                continue
            for variant in worker.ready["variants"]:
                key = f"{name}, {variant}"
                owners[key] = (name, variant)
                contestants[key] = Contestant(_runner(worker, variant), trials[OURS].max_calls)

        timings, attained, lost = measure(case, contestants, self._num_rounds)
        for key, lost_error in lost.items():
            self._lose(owners[key][0], lost_error)

        for name, trial in trials.items():
            wrong[name] = max(wrong[name], trial.num_wrong())
        for name, worker in workers.items():
            if name in self._workers:
                try:
                    answer = worker.ask(do="check")["wrong"]
                except ContestantLostError as error:
                    self._lose(name, error)
                    continue
                for variant, count in answer.items():
                    key = f"{name}, {variant}"
                    wrong[key] = max(wrong[key], count)

        rows = []
        for name in dict.fromkeys(owner for owner, _ in owners.values()):
            keys = [key for key, (owner, _) in owners.items() if owner == name and key in timings]
            if (name in workers and name not in self._workers) or not keys:
                continue  # lost on the way
            key = min(keys, key=lambda k: timings[k].median)
            rows.append(
                Row(
                    case=case,
                    contestant=name,
                    variant=owners[key][1],
                    timing=timings[key],
                    attained=attained[key],
                    times_ours=timings[key].over(timings[OURS]),
                    wrong=max(wrong[k] for k in keys),
                )
            )
        return rows

    def _prepare(self, worker: Worker, case: Case) -> dict[str, int]:
        answer = worker.ask(do="prepare", count=case.count, dtype=case.dtype.name, seed=case.seed)
        return {f"{worker.name}, {variant}": n for variant, n in answer["wrong"].items()}

    def _lose(self, name: str, error: ContestantLostError) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()
            self.failures.append(Absence(name, str(error)))

    def close(self) -> None:
        """End every peer."""
        try:
            while self._workers:
                self._workers.popitem()[1].close()
        except BaseException:  # a second Ctrl-C: the others must end all the same
            self.close()
            raise

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _runner(worker: Worker, variant: str) -> Callable[[int], float]:
    def run(num_calls: int) -> float:
        seconds: float = worker.ask(do="run", variant=variant, calls=num_calls)["seconds"]
        return seconds

    return run
