"""One step of a small network (64-128-10, batch of 256), on two replicas and in plain NumPy.

BLAS is limited to one thread in both, so that the comparison is of like with like.
"""

from __future__ import annotations

import itertools

import numpy as np

import dvkernels as dv

from .stopwatch import median_seconds

WIDTHS = (64, 128, 10)
BATCH_SIZE = 256
LEARNING_RATE = np.float32(0.1)


def _gradients(parameters, x, labels):
    """Return the gradients of the mean cross-entropy of a two-layer network."""
    w1, b1, w2, b2 = parameters
    hidden = np.maximum(x @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    delta = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= np.float32(len(labels))
    back = (delta @ w2.T) * (hidden > 0)
    return x.T @ back, back.sum(axis=0), hidden.T @ delta, delta.sum(axis=0)


def _initial_parameters(rng):
    parameters = []
    for rows, columns in itertools.pairwise(WIDTHS):
        weights = rng.standard_normal((rows, columns), dtype=np.float32)
        parameters += [weights / np.float32(np.sqrt(rows)), np.zeros(columns, np.float32)]
    return parameters


class TrainingStep:
    params = ["mirrored", "numpy"]
    param_names = ["implementation"]

    def setup(self, implementation):
        try:
            from threadpoolctl import threadpool_limits
        except ModuleNotFoundError:
            raise NotImplementedError("threadpoolctl is not installed") from None
        self.limits = threadpool_limits(1)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((BATCH_SIZE, WIDTHS[0]), dtype=np.float32)
        self.labels = rng.integers(0, WIDTHS[-1], BATCH_SIZE)
        initial = _initial_parameters(rng)
        self.parameters = [parameter.copy() for parameter in initial]
        self.step = self._step_in_numpy
        if implementation == "mirrored":
            self._set_up_mirrored(initial)

    def teardown(self, implementation):
        self.limits.restore_original_limits()
        if implementation == "mirrored":
            self.strategy.close()

    def time_step(self, implementation):
        self.step()

    def track_step(self, implementation):
        return median_seconds(self.step) * 1e6

    track_step.unit = "us"

    def _step_in_numpy(self):
        gradients = _gradients(self.parameters, self.x, self.labels)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter -= LEARNING_RATE * gradient

    def _set_up_mirrored(self, initial):
        self.strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
        with self.strategy.scope():
            self.variables = [dv.Variable(value) for value in initial]
        self.batch = self.strategy.distribute_values_from_function(self._part_of_batch)
        self.step = self._step_in_mirrored
        self._step_in_numpy()
        self._step_in_mirrored()
        for variable, expected in zip(self.variables, self.parameters, strict=True):
            np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)

    def _part_of_batch(self, context):
        parts = slice(context.replica_id_in_sync_group, None, context.num_replicas_in_sync)
        return np.ascontiguousarray(self.x[parts]), self.labels[parts].copy()

    def _step_in_mirrored(self):
        self.strategy.run(self._replica_step, args=(self.batch,))

    def _replica_step(self, batch):
        gradients = _gradients([v.read_value() for v in self.variables], *batch)
        reduced = dv.get_replica_context().all_reduce("mean", gradients)
        dv.get_replica_context().merge_call(self._update, args=(reduced,))

    def _update(self, strategy, gradients):
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.assign_sub(LEARNING_RATE * gradient.on(0))  # the same on every replica
