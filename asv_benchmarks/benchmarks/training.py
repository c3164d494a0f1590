"""Training on the digits: 512 examples per replica, 512 hidden units, one BLAS thread each.

The loop of ``python -m dvkernels train``. The speed-up of two replicas is the ratio of their
examples per second to those of one replica, in alternating runs.
"""

from __future__ import annotations

import statistics

import dvkernels as dv

EXAMPLES_PER_REPLICA = 512
EPOCHS_PER_REPLICA = 60
NUM_ROUNDS = 5


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
