"""All-reduce of replicas that share a GPU, as a fraction of the copy bandwidth.

Skipped where there is no GPU; ``python -m dvkernels info`` prints the reason.
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
