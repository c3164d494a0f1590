"""Training on the digits: 512 examples per replica, 512 hidden units, one BLAS thread each.

The loop of ``python -m dvkernels train``. The speed-up of two replicas is the ratio of their
examples per second to those of one replica, in alternating runs.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from pathlib import Path

import dvkernels as dv
from benchmarks import rounds

EXAMPLES_PER_REPLICA = 512
EPOCHS_PER_REPLICA = rounds(60)
NUM_ROUNDS = rounds(5)
STEPS_PER_BLOCK, TRACE_ROUNDS = 40, rounds(15)


class Training:
    timeout = 300

    def setup(self):
        try:
            from threadpoolctl import threadpool_limits

            from dvkernels.cli import digits
        except ModuleNotFoundError as error:
            raise NotImplementedError(f"{error.name} is not installed") from None
        self.data = digits.load("float32")
        self.limits = threadpool_limits(1, user_api="blas")
        self._train(1, 1)  # compiles

    def teardown(self):
        self.limits.restore_original_limits()

    def _train(self, num_replicas, epochs_per_replica=EPOCHS_PER_REPLICA):
        from dvkernels.cli import training_config, training_loop

        config = training_config.TrainingConfig(
            epochs=epochs_per_replica * num_replicas,
            batch_size=EXAMPLES_PER_REPLICA * num_replicas,
            num_hidden=512,
        )
        devices = [f"cpu:{k}" for k in range(num_replicas)]
        with dv.MirroredStrategy(devices) as strategy:
            return training_loop.train(strategy, config, self.data).times

    def track_step_of_one_replica(self):
        return self._train(1).seconds_per_step * 1e6

    track_step_of_one_replica.unit = "us"

    def track_step_of_two_replicas(self):
        return self._train(2).seconds_per_step * 1e6

    track_step_of_two_replicas.unit = "us"

    def track_gain_of_two_replicas(self):
        ratios = []
        for _ in range(NUM_ROUNDS):
            one, two = self._train(1), self._train(2)
            ratios.append(two.examples_per_second / one.examples_per_second)
        return statistics.median(ratios)

    track_gain_of_two_replicas.unit = "times the examples/s of one"

    def track_cost_of_a_trace(self):
        """Compare steps of two replicas while a trace records them with the same without one."""
        from dvkernels.cli import training_loop

        with (
            tempfile.TemporaryDirectory() as folder,
            dv.MirroredStrategy(["cpu:0", "cpu:1"]) as two,
        ):
            config = training_loop.TrainingConfig(epochs=10**6)
            training = training_loop.Training(two, config, self.data)

            def seconds_per_step(is_traced):
                training.times.clear()
                if is_traced:
                    with dv.profiler.trace(Path(folder) / "run.json"):
                        training.advance(STEPS_PER_BLOCK)
                else:
                    training.advance(STEPS_PER_BLOCK)
                return training.times.seconds_per_step

            with training.batches:
                training.advance(STEPS_PER_BLOCK)
                ratios = []
                for is_first in itertools.islice(itertools.cycle([True, False]), TRACE_ROUNDS):
                    times = {
                        traced: seconds_per_step(traced) for traced in (is_first, not is_first)
                    }
                    ratios.append(times[True] / times[False])
        return 100 * (statistics.median(ratios) - 1)

    track_cost_of_a_trace.unit = "% of a step"
