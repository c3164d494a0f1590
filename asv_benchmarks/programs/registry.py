"""Registry of the programs: one visible table, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Mapping

from programs import batches, bootstrap, logistic, moments, network, pictures, step, sweep
from programs.program import Program

__all__ = ["PROGRAMS"]

PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        *network.PROGRAMS,
        logistic.PROGRAM,
        batches.PROGRAM,
        bootstrap.PROGRAM,
        sweep.PROGRAM,
        pictures.PROGRAM,
        moments.PROGRAM,
        *step.PROGRAMS,
    )
}
