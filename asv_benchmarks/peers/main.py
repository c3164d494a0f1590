"""Command line of the benchmarks beside other libraries."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.cli import main as command_line

__all__ = ["VERBS", "main"]

VERBS = {
    "bench": "peers.bench",
    "bench-input": "peers.bench_input",
    "bench-checkpoint": "peers.bench_checkpoint",
    "bench-workers": "peers.bench_workers",
    "record-limits": "peers.record_limits",
    "check-limits": "peers.check_limits",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status, as ``python -m dvkernels`` does."""
    return command_line.main(argv, VERBS, "python -m peers", __doc__)
