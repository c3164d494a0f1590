"""Runner of replicas on devices: one CUDA stream or default device each, ordered at collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvkernels.devices.jax_devices import DefaultDevices
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.runner import Call, Runner
from dvkernels.replicas.task_farm import TaskFarm
from dvkernels.replicas.work_meter import MeteredRendezvous, WorkMeter

__all__: list[str] = []


class StreamedRunner:
    """Runner that wraps another one, and runs each replica on its own stream of ``order``."""

    def __init__(self, runner: Runner, order: StreamOrder | DefaultDevices) -> None:
        self._runner = runner
        self._order = order

    def run(self, call: Call, nested: bool) -> list[Any]:
        """Return ``[call(step, replica) for each replica]``, called concurrently."""
        order = self._order

        def on_stream(step: Rendezvous, rank: int) -> Any:
            step.perform = order.meet
            with order.replica(rank):
                if not isinstance(step, MeteredRendezvous):
                    return call(step, rank)
                step.resume(rank)
                result = call(step, rank)
                step.pause(rank)
                return result

        with order.step():
            results: list[Any] = self._runner.run(on_stream, nested)
            return results

    def run_program(self, program: Callable[[], Any]) -> Any:
        """Return ``program()``, the step of all replicas at once, called on this thread."""
        return self._runner.run_program(program)

    def farm_out(self, farm: TaskFarm) -> None:
        """Occupy the replicas with a task farm, which comes after the caller's earlier work."""
        farm.streams = self._order
        self._order.exchange()
        self._runner.farm_out(farm)

    def measure_work(self) -> WorkMeter:
        """Measure the work of the replicas in all later steps; return the meter."""
        return self._runner.measure_work(self._order.finish)

    def close(self) -> None:
        """End the threads; the streams live as long as the strategy."""
        self._runner.close()
