"""A custom communicator and a custom strategy, checked by the suites of dvkernels.testing.

The communicator reduces in a binary tree. The strategy takes a number of replicas instead of a
list of devices.
"""

import numpy as np

import dvkernels as dv
from dvkernels import kernels, testing


class Tree:
    """Communicator that reduces in a binary tree: (0 + 1) + (2 + 3); any number of ranks."""

    def __init__(self, size):
        self.size = size

    def reduce(self, values, op):
        if op is dv.ReduceOp.MEAN or values[0].dtype.itemsize < 4 or len(values) < 3:
            return kernels.reduce(values, op)  # results that must be rounded only once
        while len(values) > 1:
            pairs = [values[k : k + 2] for k in range(0, len(values), 2)]
            values = [kernels.reduce(pair, op) for pair in pairs]
        return values[0]

    def all_reduce(self, values, op, out=None):
        result = self.reduce(values, op)
        out = [np.empty_like(value) for value in values] if out is None else out
        for target in out:
            target[...] = result
        return list(out)

    def reduce_scatter(self, values, op):
        return [part.copy() for part in np.array_split(self.reduce(values, op), self.size)]

    def all_gather(self, values, axis):
        return [np.concatenate(values, axis) for _ in values]

    def broadcast(self, values, root):
        return [values[root].copy() for _ in values]


class TreeStrategy(dv.Strategy):
    """A given number of CPU replicas that communicate by a tree."""

    def __init__(self, num_replicas):
        devices = tuple(dv.Device("cpu", index) for index in range(num_replicas))
        super().__init__(devices, Tree(num_replicas))


testing.check_communicator(Tree)
testing.check_strategy(TreeStrategy)

with TreeStrategy(5) as strategy:
    ids = strategy.run(lambda: dv.get_replica_context().replica_id_in_sync_group)
    assert strategy.reduce("sum", ids) == 10
    print(f"{strategy}: the communicator and the strategy pass their suites")
