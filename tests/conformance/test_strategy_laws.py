"""Every strategy keeps the laws that ship with the package, and the laws find what breaks them."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import devices, only_cpu

import dvkernels as dv
from dvkernels.communicators.local import Local
from dvkernels.testing import assert_same_on, check_strategy


@pytest.mark.parametrize(
    "make",
    [
        lambda n: dv.MirroredStrategy(devices(n)),
        lambda n: dv.MirroredStrategy(devices(n), cross_device_ops="ring"),
        lambda n: dv.MirroredStrategy(devices(n), bytes_per_bucket=64),
        lambda n: dv.CentralStorageStrategy(devices(n)),
        lambda n: dv.MultiWorkerMirroredStrategy(
            dv.cluster.SimpleClusterResolver({}), devices=devices(n)
        ),
    ],
    ids=["mirrored", "ring", "buckets", "central storage", "one worker"],
)
def test_strategies_of_several_replicas(make):
    check_strategy(make, replicas=(1, 2, 3))


def test_one_device():
    check_strategy(lambda n: dv.OneDeviceStrategy(devices(1)[0]), replicas=[1])


@only_cpu
def test_parameter_server():
    check_strategy(lambda n: dv.ParameterServerStrategy(num_workers=n), replicas=[1])


class Deaf(Local):
    """Defective communicator whose all-reduce returns each rank's own value."""

    def all_reduce(self, values, op, out=None):
        return [np.array(value) for value in values]


@only_cpu
def test_a_defect_is_found():
    with pytest.raises(AssertionError, match="all_reduce") as caught:
        check_strategy(
            lambda n: dv.MirroredStrategy(devices(n), cross_device_ops=Deaf(n, "auto")), [2]
        )
    assert "2 replicas" in caught.value.__notes__[0]


def weights(strategy, wrong=False):
    with strategy.scope():
        weight = dv.Variable(np.zeros(2), aggregation="sum" if wrong else "mean")
    data = dv.Dataset.from_arrays(np.arange(26.0).reshape(13, 2)).batch(5)

    def step(rows):
        here = dv.get_replica_context()
        mean = here.all_reduce("mean", rows.sum(0) / max(1, len(rows)), weight=len(rows))
        weight.assign_add(mean)

    for rows in strategy.distribute_dataset(data):
        strategy.run(step, (rows,))
    return {"weight": weight, "steps": 3}


def test_same_on_any_number_of_replicas():
    assert_same_on(weights)


def test_a_result_that_depends_on_the_number_of_replicas_is_found():
    with pytest.raises(AssertionError, match="2 replicas, leaf 1"):
        assert_same_on(lambda strategy: weights(strategy, wrong=True), [1, 2])
