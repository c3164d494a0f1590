"""All-reduce of replicas that share a GPU, beside a copy within it, CuPy and PyTorch.

Skipped where there is no GPU: the reason is printed by ``python -m dvkernels info``.
"""

from dvkernels.benchmarks import gpu
from dvkernels.devices import cuda


class AllReduceOnOneGpu:
    params = [[2, 4, 8], ["4K", "1M", "256M"]]
    param_names = ["replicas", "bytes"]
    unit = "of the copy's bandwidth"

    def setup(self, replicas, nbytes):
        if cuda.is_simulated() or cuda.missing():
            raise NotImplementedError(cuda.missing() or "times of the simulator mean nothing")

    def track_attained(self, replicas, nbytes):
        size = int(nbytes[:-1]) << {"K": 10, "M": 20}[nbytes[-1]]
        plan = gpu.MeasurementPlan(nbytes=size, replicas=(replicas,))
        return gpu.all_reduce(0, plan, replicas).attained

    track_attained.unit = unit
