"""Devices print and parse; what does not exist is named together with what does."""

from __future__ import annotations

import math

import pytest

import dvkernels as dv
from dvkernels.devices import cpu
from dvkernels.errors import DeviceError


def test_prints_and_parses():
    assert str(dv.Device.parse("cpu:12")) == "cpu:12"
    assert dv.Device.parse("cuda:1") == dv.Device("cuda", 1)


@pytest.mark.parametrize("name", ["", "cpu", "cpu:", "cpu:-1", "cpu:01", "CPU:0", "cpu:0 ", "gpu0"])
def test_a_bad_name(name):
    with pytest.raises(DeviceError, match="expected a device name"):
        dv.Device.parse(name)


def test_one_logical_device_per_usable_core():
    devices = dv.list_devices("cpu")
    assert [str(device) for device in devices] == [f"cpu:{k}" for k in range(cpu.usable_cores())]
    assert dv.list_devices() == devices
    with pytest.raises(DeviceError, match="no devices of kind 'tpu'"):
        dv.list_devices("tpu")


@pytest.mark.parametrize("devices", [[], ["cuda:0"], ["cpu:0", "x"], "cpu:0", 3, [None]])
def test_a_strategy_names_the_devices_there_are(devices):
    with pytest.raises(DeviceError, match="the devices here are cpu:0"):
        dv.MirroredStrategy(devices)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "nonsense"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({}, math.inf),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, files, cores):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert cpu.cgroup_quota(tmp_path) == cores
