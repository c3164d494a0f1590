"""All-reduce of many arrays, optimizer steps with a fused reduction, and compiled barriers."""

from __future__ import annotations

import numpy as np

from benchmarks import rounds
from dvkernels import kernels
from dvkernels.benchmarks import gradients
from dvkernels.benchmarks.stopwatch import median_seconds, ratio

NUM_ROUNDS = rounds(9)


class AllReduceMany:
    timeout = 300

    def track_resnet_50_attained_fraction_of_probe(self):
        found = gradients.many(4, NUM_ROUNDS)
        return ratio(found["probe"], found["ours"])

    track_resnet_50_attained_fraction_of_probe.unit = "of the faster probe"

    def track_ten_thousand_small_arrays(self):
        groups = [[np.ones(64, np.float32) for _ in range(2)] for _ in range(10_000)]
        call = lambda: kernels.all_reduce_many(groups, "mean")  # noqa: E731
        return median_seconds(call) / len(groups) * 1e6

    track_ten_thousand_small_arrays.unit = "us an array"


class FusedAdam:
    timeout = 300

    def track_share_of_separate_passes(self):
        found = gradients.fused_adam(4, 64 << 20, NUM_ROUNDS)
        return ratio(found["fused"], found["separate"])

    track_share_of_separate_passes.unit = "of their time"


class Group:
    def track_barrier_in_compiled_code(self):
        return gradients.barrier_seconds(2) * 1e6

    track_barrier_in_compiled_code.unit = "us"
