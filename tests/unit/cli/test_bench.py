"""Wrong elements are found, peers that fail are named and gone, bad input is one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dvkernels import kernels
from dvkernels.benchmarks import memory
from dvkernels.benchmarks.cases import COLLECTIVES
from dvkernels.benchmarks.peers import worker
from dvkernels.cli import main

FEW = ["--sizes", "4:1K", "--factor", "16", "--rounds", "2"]


def bench(capsys, *options):
    status = main.main(["bench", *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_every_collective_is_right(capsys):
    status, out, _ = bench(capsys, *COLLECTIVES, *FEW, "--replicas", "3", "--peers", "numpy")
    assert status == 0
    rows = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert len(rows) == len(COLLECTIVES) * 3 * 2  # sizes, contestants
    assert {row[11] for row in rows} == {"0"}
    assert all(f"# {name}, 3 replicas" in out for name in COLLECTIVES)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_wrong_kernel_is_found(collective, capsys, monkeypatch):
    right = getattr(kernels, collective)

    def wrong(buffers, *arguments, **options):
        results = right(buffers, *arguments, **options)
        arrays = [results] if collective == "reduce" else results
        arrays[-1][-1:] += 1
        return results

    monkeypatch.setattr(kernels, collective, wrong)
    status, out, _ = bench(capsys, collective, "--sizes", "400", "--rounds", "1", "--json")
    assert status == 1
    assert [row["wrong"] for row in json.loads(out)["rows"]] == [1]


@pytest.mark.parametrize(
    ("dtype", "op", "algorithm"),
    [
        ("float16", "mean", "direct"),
        ("bfloat16", "sum", "ring"),
        ("int8", "sum", "auto"),
        ("bool", "max", "auto"),
        ("complex64", "prod", "auto"),
        ("float64", "MIN", "auto"),
    ],
)
def test_json(dtype, op, algorithm, capsys, tmp_path):
    path = tmp_path / "bench.json"
    options = ["--dtype", dtype, "--op", op, "--algorithm", algorithm, "--sizes", "64:1K"]
    status, out, _ = bench(capsys, *options, "--rounds", "2", "--json", str(path))
    assert status == 0
    report = json.loads(path.read_text())
    assert report["about"].keys() >= {"processor", "date", "commit", "command", "rounds"}
    rows = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert [row["size"] for row in report["rows"]] == [64, 256, 1024]
    for entry, row in zip(report["rows"], rows, strict=True):
        assert [str(entry[k]) for k in ("size", "count", "dtype", "op", "algorithm")] == row[:5]
        assert entry["op"] == op.lower()
        low, high = entry["quartiles_us"]
        assert 0 < low <= entry["time_us"] <= high
        assert entry["algbw"] == pytest.approx(entry["size"] / entry["time_us"] / 1e3)
        assert entry["busbw"] == entry["algbw"]  # 2 (R - 1) / R with R = 2
        assert entry["attained"] > 0
        assert entry["times_ours"] == 1


@pytest.mark.parametrize(
    "options",
    [
        ["all_reduced"],
        ["--dtype", "float31"],
        ["--dtype", "U8"],
        ["--op", "median"],
        ["--op", "mean", "--dtype", "int32"],
        ["--algorithm", "magic"],
        ["--sizes", "4:tons"],
        ["--sizes", "4K:4"],
        ["--factor", "1"],
        ["--replicas", "0"],
        ["--replicas", "two"],
        ["--rounds", "0"],
        ["--seed", "-1"],
        ["--peers", "horovod"],
        ["--peer-python", "numpy=/bin/true"],
        ["--peer-python", "jax"],
        ["--peer-python", "jax=/no/such/python"],
        ["--plot", "/no/such/folder/x.png"],
        ["--plot", "x.docx"],
        ["--json", "/no/such/folder/x.json"],
        ["--json", "broadcast"],
    ],
)
def test_bad_input_is_one_line(options, capsys):
    status, out, err = bench(capsys, *options)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = bench(capsys, "--plot", str(tmp_path / "x.png"))
    assert status == 2
    assert "dvkernels[plot]" in err


def test_a_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.svg"
    status, _, _ = bench(capsys, "all_reduce", "broadcast", *FEW, "--plot", str(path))
    assert status == 0
    assert "<svg" in path.read_text()


def test_what_memory_has_no_room_for_is_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 6000)
    status, out, err = bench(capsys, "--sizes", "4:16K", "--rounds", "1", "--json")
    assert status == 0
    report = json.loads(out)
    assert [row["size"] for row in report["rows"]] == [4, 16, 64, 256, 1024]
    assert "4K, 16K left out" in report["notes"][0]
    assert "4K, 16K left out" in err
    monkeypatch.setattr(memory, "available_bytes", lambda: 10)
    assert bench(capsys, "--rounds", "1")[0] == 2


# -- peers: an interpreter that is none, and plays one ------------------------------------------

FAKE = """#!{python}
import json, os, signal, subprocess, sys, time
if sys.argv[1] == "-c":
    sys.exit({has_package})
def say(**message):
    print(json.dumps(message), flush=True)
child = subprocess.Popen(["sleep", "1000"])  # a rank
with open({pids!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
mode = {mode!r}
print("a launcher's own words", flush=True)
say(version="fake", ranks=2, variants=["slow way", "fast way"])
for line in sys.stdin:
    message = json.loads(line)
    if message["do"] == "end":
        break
    if message["do"] != "run":
        say(wrong={{"slow way": 0, "fast way": 5 if mode == "wrong" else 0}})
        continue
    if mode == "dies":
        sys.exit("out of luck")
    if mode == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    say(seconds=message["calls"] * (1e-3 if message["variant"] == "fast way" else 2e-3))
child.kill()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_SECONDS_TO_END", 0.3)

    def make(mode, has_package=True):
        path, pids = tmp_path / "python", tmp_path / "pids"
        path.write_text(
            FAKE.format(
                python=sys.executable, mode=mode, pids=str(pids), has_package=int(not has_package)
            )
        )
        path.chmod(0o755)
        return f"jax={path}", pids

    return make


def assert_gone(pids):
    for pid in map(int, pids.read_text().split()):
        end = time.monotonic() + 5
        while psutil.pid_exists(pid) and time.monotonic() < end:
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # its parent is gone
                    break
            time.sleep(0.01)
        else:
            assert not psutil.pid_exists(pid)


def test_the_better_way_of_a_peer_is_kept(fake, capsys):
    option, pids = fake("well")
    status, out, _ = bench(capsys, *FEW, "--peer-python", option, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["about"]["peers"] == {"jax": "fake"}
    theirs = [row for row in report["rows"] if row["by"] == "jax"]
    assert len(theirs) == 3
    for row in theirs:
        assert row["variant"] == "fast way"
        assert row["time_us"] == pytest.approx(1000)
        assert row["times_ours"] > 1
    assert_gone(pids)


def test_a_wrong_peer_is_found(fake, capsys):
    option, pids = fake("wrong")
    status, out, _ = bench(capsys, *FEW, "--peer-python", option)
    assert status == 1
    assert "# wrong elements: 15" in out
    assert_gone(pids)


@pytest.mark.parametrize(("mode", "said"), [("dies", "out of luck"), ("hangs", "more than 1 s")])
def test_a_lost_peer_is_reported_and_the_rest_goes_on(mode, said, fake, capsys):
    option, pids = fake(mode)
    options = ["--peer-python", option, "--peer-timeout", "1", "--json"]
    status, out, err = bench(capsys, *FEW, *options)
    report = json.loads(out)
    assert status == 0
    assert [row["by"] for row in report["rows"]] == ["dvkernels"] * 3
    assert [lost["peer"] for lost in report["failures"]] == ["jax"]
    assert said in report["failures"][0]["reason"]
    assert said in err
    assert_gone(pids)


def test_a_peer_that_is_not_here_is_named(fake, capsys):
    option, _ = fake("well", has_package=False)
    status, out, _ = bench(capsys, *FEW, "--peers", "numpy", "jax", "--peer-python", option)
    assert status == 0
    assert "# skipped jax: " in out
    assert "does not have the package jax" in out
    assert "pip install numpy jax" in out
    assert "numpy\n" in out


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_an_interrupt_leaves_no_process(fake):
    option, pids = fake("well")
    command = [sys.executable, "-m", "dvkernels", "bench", "--rounds", "100000", "--sizes", "4"]
    with subprocess.Popen(
        [*command, "--peer-python", option], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 30
        while not (pids.exists() and pids.read_text()):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert_gone(pids)
