"""The cases: a collective, its inputs, its call, what must come of it, what must move.

With R replicas of S bytes. ``all_gather`` counts the bytes of one input, as everything here does;
nccl-tests counts those of its result, R times as many, so the factor of its bus bandwidth is R
times as large here and the bus bandwidth the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.failures import BenchmarkError
from dvkernels.benchmarks.inputs import Piece

__all__: list[str] = []

Lengths = list[int]


@dataclass(frozen=True)
class Collective:
    """What is particular to one collective; R replicas of S bytes, or of ``length`` elements."""

    reduces: bool
    has_algorithms: bool
    num_moved_bytes: Callable[[int, int], float]  # (R, S): read and written, with streaming stores
    bus_factor: Callable[[int], float]  # (R): bus bandwidth over algorithm bandwidth
    out_lengths: Callable[[int, int], Lengths]  # (R, length): of the arrays that receive results
    pieces: Callable[[int, int], Iterator[Piece]]  # (R, length): what belongs where


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    collective: str
    count: int  # elements of one buffer
    dtype: np.dtype[Any]
    op: str = "sum"
    num_replicas: int = 2
    algorithm: str = "auto"
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """The size of one buffer in bytes."""
        return self.count * self.dtype.itemsize

    @property
    def moved_bytes(self) -> float:
        """The bytes that must be read or written."""
        return COLLECTIVES[self.collective].num_moved_bytes(self.num_replicas, self.nbytes)

    @property
    def touched_bytes(self) -> int:
        """The bytes of all buffers and of the arrays that receive results."""
        collective = COLLECTIVES[self.collective]
        out = sum(collective.out_lengths(self.num_replicas, self.count))
        return self.num_replicas * self.nbytes + out * self.dtype.itemsize

    @property
    def bus_factor(self) -> float:
        """Bus bandwidth over algorithm bandwidth."""
        return COLLECTIVES[self.collective].bus_factor(self.num_replicas)


def _edges(num_replicas: int, length: int) -> list[tuple[int, int]]:
    """Return where the parts of ``numpy.array_split`` start and stop."""
    size, longer = divmod(length, num_replicas)
    starts = [r * size + min(r, longer) for r in range(num_replicas + 1)]
    return list(itertools.pairwise(starts))


def _part_lengths(num_replicas: int, length: int) -> Lengths:
    return [stop - start for start, stop in _edges(num_replicas, length)]


def _reduced_everywhere(num_replicas: int, length: int) -> Iterator[Piece]:
    return (Piece(r, 0, None, 0, length) for r in range(num_replicas))


def _root_everywhere(num_replicas: int, length: int) -> Iterator[Piece]:
    return (Piece(r, 0, 0, 0, length) for r in range(num_replicas))


def _reduced_parts(num_replicas: int, length: int) -> Iterator[Piece]:
    for r, (start, stop) in enumerate(_edges(num_replicas, length)):
        yield Piece(r, 0, None, start, stop)


def _all_inputs_everywhere(num_replicas: int, length: int) -> Iterator[Piece]:
    for result in range(num_replicas):
        for source in range(num_replicas):
            yield Piece(result, source * length, source, 0, length)


def _exchanged_parts(num_replicas: int, length: int) -> Iterator[Piece]:
    for result, (start, stop) in enumerate(_edges(num_replicas, length)):
        for source in range(num_replicas):
            yield Piece(result, source * (stop - start), source, start, stop)


COLLECTIVES = {
    # Results lie in place where there are no out_lengths.
    "all_reduce": Collective(
        reduces=True,
        has_algorithms=True,
        num_moved_bytes=lambda R, S: 2 * R * S,
        bus_factor=lambda R: 2 * (R - 1) / R,
        out_lengths=lambda R, length: [],
        pieces=_reduced_everywhere,
    ),
    "broadcast": Collective(
        reduces=False,
        has_algorithms=False,
        num_moved_bytes=lambda R, S: S + (R - 1) * S,
        bus_factor=lambda R: 1,
        out_lengths=lambda R, length: [],
        pieces=_root_everywhere,
    ),
    "reduce": Collective(
        reduces=True,
        has_algorithms=False,
        num_moved_bytes=lambda R, S: (R + 1) * S,
        bus_factor=lambda R: 1,
        out_lengths=lambda R, length: [length],
        pieces=lambda R, length: iter([Piece(0, 0, None, 0, length)]),
    ),
    "reduce_scatter": Collective(
        reduces=True,
        has_algorithms=False,
        num_moved_bytes=lambda R, S: R * S + S,
        bus_factor=lambda R: (R - 1) / R,
        out_lengths=_part_lengths,
        pieces=_reduced_parts,
    ),
    "all_gather": Collective(
        reduces=False,
        has_algorithms=False,
        num_moved_bytes=lambda R, S: R * S + R * R * S,
        bus_factor=lambda R: R - 1,
        out_lengths=lambda R, length: [R * length] * R,
        pieces=_all_inputs_everywhere,
    ),
    "all_to_all": Collective(
        reduces=False,
        has_algorithms=False,
        num_moved_bytes=lambda R, S: 2 * R * S,
        bus_factor=lambda R: (R - 1) / R,
        out_lengths=lambda R, length: [R * part for part in _part_lengths(R, length)],
        pieces=_exchanged_parts,
    ),
}


class Arrays:
    """The buffers of one case, and the arrays that receive what does not lie in place."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._collective = COLLECTIVES[case.collective]
        self.buffers = [np.empty(case.count, case.dtype) for _ in range(case.num_replicas)]
        lengths = self._collective.out_lengths(case.num_replicas, case.count)
        self.out = [np.empty(length, case.dtype) for length in lengths]
        in_place = self._collective.reduces and not lengths
        limit = inputs.calls_in_place(case.dtype, case.op, case.num_replicas)
        self.max_calls = limit if in_place else None
        self.calls_since_filled = 0
        self.is_calm = False  # filled with what may be reduced in place again and again

    def fill(self, calm: bool) -> None:
        """Make the buffers the inputs, and forget earlier results."""
        for replica, buffer in enumerate(self.buffers):
            inputs.fill(buffer, self.case.op, self.case.seed, replica, calm)
        for array in self.out:
            array.view(np.uint8)[:] = 0xFF
        self.calls_since_filled = 0
        self.is_calm = calm

    def num_wrong(self) -> int:
        """Count the elements that one call on filled buffers got wrong."""
        case = self.case
        return inputs.num_wrong(
            self.out or self.buffers,
            self._collective.pieces(case.num_replicas, case.count),
            case.op,
            case.seed,
            case.num_replicas,
            case.count,
        )


class Trial:
    """One way to do a case, over arrays that other trials may share."""

    def __init__(self, arrays: Arrays, call: Callable[[], object]) -> None:
        self._arrays = arrays
        self._call = call
        # One call beside those that are timed warms up what filling has left in other caches.
        limit = arrays.max_calls
        self.max_calls = None if limit is None else max(1, limit - 1)

    def num_wrong(self) -> int:
        """Call once on fresh random data and count the elements that are wrong."""
        self._arrays.fill(calm=False)
        self._call()
        return self._arrays.num_wrong()

    def run(self, num_calls: int) -> float:
        """Return the seconds of so many calls; what they need is filled in before."""
        arrays, call = self._arrays, self._call
        limit = arrays.max_calls
        too_many = limit is not None and arrays.calls_since_filled + num_calls > limit
        if too_many or not arrays.is_calm:
            arrays.fill(calm=True)
            call()
            arrays.calls_since_filled = 1
        arrays.calls_since_filled += num_calls
        began = time.perf_counter()
        for _ in range(num_calls):
            call()
        return time.perf_counter() - began


def ours(arrays: Arrays) -> Callable[[], object]:
    """Return the call of this library; the function is looked up now."""
    case, buffers, out = arrays.case, arrays.buffers, arrays.out
    function: Any = getattr(kernels, case.collective, None)
    if function is None:
        raise BenchmarkError(f"this version of dvkernels has no kernels.{case.collective}")
    options: dict[str, Any] = {}
    arguments: list[Any] = [buffers]
    if COLLECTIVES[case.collective].reduces:
        arguments.append(case.op)
    if COLLECTIVES[case.collective].has_algorithms:
        options["algorithm"] = case.algorithm
    if out:
        options["out"] = out[0] if case.collective == "reduce" else out
    return lambda: function(*arguments, **options)


def check_name(name: str) -> str:
    """Return ``name`` if it is a collective's, else raise with those that are."""
    if name not in COLLECTIVES:
        raise BenchmarkError(f"no collective {name!r}; there are {', '.join(COLLECTIVES)}")
    return name
