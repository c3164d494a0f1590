"""Steps of replicas on GPUs: each runs on a stream of its own, and meetings put them in order."""

from __future__ import annotations

from typing import Any

from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.runner import Call, Runner

__all__: list[str] = []


class StreamedRunner:
    """Runs steps as another runner does, with work on GPUs in the order that ``order`` says."""

    def __init__(self, runner: Runner, order: StreamOrder) -> None:
        self._runner = runner
        self._order = order

    def run(self, call: Call, nested: bool) -> list[Any]:
        """Return ``[call(step, replica) for each replica]``, called at the same time."""
        order = self._order

        def on_stream(step: Rendezvous, rank: int) -> Any:
            step.perform = order.meet
            with order.replica(rank):
                return call(step, rank)

        with order.step():
            return self._runner.run(on_stream, nested)

    def close(self) -> None:
        """End the threads; the streams go with the strategy."""
        self._runner.close()
