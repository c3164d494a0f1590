"""Devices: parsing, listing, usable cores; errors list the devices that exist."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import fork_server
import numpy as np
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


@pytest.mark.parametrize("count", [1, 4, np.int64(3)])
def test_a_count_of_devices(count):
    names = tuple(f"cpu:{k}" for k in range(count))
    for make in (
        dv.MirroredStrategy,
        dv.CentralStorageStrategy,
        dv.Strategy,
        lambda devices: dv.MultiWorkerMirroredStrategy(devices=devices),
    ):
        with make(count) as strategy:
            assert tuple(map(str, strategy.worker_devices)) == names


@pytest.mark.parametrize(
    "devices", [[], ["cuda:0"], ["cpu:0", "x"], "cpu:0", 2.5, [None], True, False, 0, -1]
)
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


@pytest.mark.parametrize(
    ("cores", "described"),
    [({3}, "core 3"), ({0, 1, 2, 3}, "cores 0-3"), ({0, 2, 3, 8}, "cores 0,2-3,8")],
)
def test_cores_are_described_in_runs(monkeypatch, cores, described):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    assert cpu.described_affinity() == described


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
USABLE = "from dvkernels.devices import cpu; print(cpu.usable_cores())"


def usable_below(command, **environ):
    given = {name: str(value) for name, value in environ.items()}
    if not command:
        return int(fork_server.run(USABLE, **given).stdout)
    child = subprocess.run(
        [*command, sys.executable, "-c", USABLE],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(child.stdout)


def hydra(num_local, rank=0):
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return dict(zip(names, (rank, num_local, rank, num_local), strict=True))


@pytest.mark.skipif(CORES < 2, reason="one core cannot be shared out")
def test_workers_of_a_launcher_share_the_cores():
    alone = usable_below([])
    assert alone == cpu.usable_cores()
    assert usable_below([], **hydra(1)) == alone
    for num_local in (2, CORES, 3 * CORES):
        assert usable_below([], **hydra(num_local)) == max(1, alone // num_local)


@pytest.mark.skipif(CORES < 2, reason="one core cannot be shared out")
@pytest.mark.skipif(shutil.which("taskset") is None, reason="there is no taskset")
def test_a_worker_that_its_launcher_has_bound_keeps_what_it_got():
    core = str(min(os.sched_getaffinity(0)))
    assert usable_below(["taskset", "-c", core], **hydra(2)) == 1
