"""Parameter-server strategy: a strategy of one replica, whose tables are saved and trained."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import ClusterError, DeviceError


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_servers": 1}, ClusterError),
        ({"num_servers": -1}, ClusterError),
        ({"cluster_resolver": object()}, TypeError),
        ({"num_servers": 1, "num_workers": 2}, ClusterError),
        ({"variable_partitioner": 3}, ClusterError),
        ({"num_workers": 0}, DeviceError),
        ({"num_workers": True}, DeviceError),
        ({"threads": "some"}, ValueError),
    ],
)
def test_what_does_not_exist_is_refused(options, error):
    with pytest.raises(error):
        dv.ParameterServerStrategy(**options)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_a_table_and_its_slots_are_restored_on_another_number_of_shards(tmp_path, shards):
    def made(partitioner):
        strategy = dv.ParameterServerStrategy(variable_partitioner=partitioner, num_workers=2)
        with strategy.scope():
            return strategy, dv.Variable(np.arange(20.0).reshape(10, 2)), dv.optimizers.Adagrad(0.5)

    ids, slopes = [1, 9, 1], np.ones((3, 2))
    strategy, table, adagrad = made(dv.partitioners.FixedShards(4))
    adagrad.apply_gradients([((ids, slopes), table)])
    dv.Checkpoint(table=table, adagrad=adagrad, strategy=strategy).save(tmp_path / "saved")
    adagrad.apply_gradients([((ids, slopes), table)])
    other, restored, twin = made(dv.partitioners.FixedShards(shards))
    dv.Checkpoint(table=restored, adagrad=twin, strategy=other).restore(tmp_path / "saved")
    twin.apply_gradients([((ids, slopes), restored)])
    assert np.array_equal(table, restored)
    plain = dv.Variable(np.zeros((10, 2)))
    dv.Checkpoint(table=plain).restore(tmp_path / "saved", partial=True)
    assert plain.numpy().any()
    strategy.close()
    other.close()
