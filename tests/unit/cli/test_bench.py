"""bench times every collective, counts wrong elements, and names what it leaves out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dvkernels import kernels
from dvkernels.benchmarks import available_memory
from dvkernels.cli import main

QUICK = ["--sizes", "64,4K", "--rounds", "2"]


def bench(capsys, *arguments):
    status = main.main(["bench", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def results(text):
    return json.loads(text)["results"]


@pytest.mark.parametrize(
    "collective",
    ["all_reduce", "broadcast", "reduce", "reduce_scatter", "all_gather", "all_to_all"],
)
@pytest.mark.parametrize(("replicas", "dtype"), [("2", "float32"), ("3", "bfloat16")])
def test_every_collective_is_right_and_timed(collective, replicas, dtype, capsys):
    arguments = [collective, *QUICK, "--replicas", replicas, "--dtype", dtype, "--json"]
    status, out, _ = bench(capsys, *arguments)
    assert status == 0
    for record in results(out):
        assert record["collective"] == collective
        assert record["wrong"] == 0
        assert record["seconds"] > 0
        low, high = record["seconds_quartiles"]
        assert low <= record["seconds"] <= high
        assert record["algbw_GBps"] == pytest.approx(record["nbytes"] / record["seconds"] / 1e9)
        assert record["attained"] > 0


def test_the_table_has_a_line_per_size_and_counts_no_errors(capsys):
    status, out, _ = bench(capsys, "--sizes", "4:256", "--rounds", "2", "--algorithm", "ring")
    assert status == 0
    lines = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert [line[0] for line in lines] == ["4", "16", "64", "256"]
    assert {line[4] for line in lines} == {"ring"}
    assert "0 wrong elements" in out


def test_a_wrong_kernel_is_found(capsys, monkeypatch):
    right = kernels.all_reduce

    def wrong(buffers, *arguments, **options):
        reduced = right(buffers, *arguments, **options)
        reduced[1][-1] += 1
        return reduced

    monkeypatch.setattr(kernels, "all_reduce", wrong)
    status, out, _ = bench(capsys, *QUICK)
    assert status == 1
    assert "2 wrong elements" in out


def test_the_json_file_can_be_read(capsys, tmp_path):
    path = tmp_path / "found.json"
    status, _, _ = bench(capsys, *QUICK, "--json", str(path), "--peers", "numpy")
    assert status == 0
    found = json.loads(path.read_text())
    assert set(found["results"][0]["peers"]) == {"numpy"}
    assert found["peers"]["numpy"].startswith(f"numpy {np.__version__}")
    assert found["machine"]


def test_sizes_that_do_not_fit_are_named(capsys, monkeypatch):
    monkeypatch.setattr(available_memory, "available_nbytes", lambda: 1 << 20)
    status, out, _ = bench(capsys, "--sizes", "64,64M", "--rounds", "1")
    assert status == 0
    assert "67108864 bytes left out" in out


def test_other_libraries_are_measured_from_a_clone(capsys):
    status, _, err = bench(capsys, *QUICK, "--peers", "numpy", "mpich")
    assert status == 2
    assert "cd asv_benchmarks && python -m peers bench --peers mpich" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["all_reduced"],
        ["--dtype", "float31"],
        ["--dtype", "object"],
        ["--op", "median"],
        ["--op", "mean", "--dtype", "int32"],
        ["--algorithm", "magic"],
        ["--replicas", "0"],
        ["--rounds", "0"],
        ["--sizes", "much"],
        ["--sizes", "4M:4K"],
        ["--sizes", "-4"],
        ["--factor", "1"],
        ["--peers", "horovod"],
        ["--plot", "/nowhere/at/all.png"],
        ["--json", "/nowhere/at/all.json"],
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    status, _, err = bench(capsys, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_plot_needs_matplotlib(capsys, tmp_path, monkeypatch):
    path = tmp_path / "curves.svg"
    try:
        import matplotlib  # noqa: F401 - only whether it is installed
    except ImportError:
        status, _, err = bench(capsys, *QUICK, "--plot", str(path))
        assert status == 2
        assert "dvkernels[plot]" in err
    else:
        assert bench(capsys, *QUICK, "--plot", str(path))[0] == 0
        assert path.read_text().startswith("<?xml")


def test_calibration_prints_every_constant(capsys):
    status, out, _ = bench(capsys, "--calibrate", "--rounds", "1")
    assert status == 0
    for name in ("call_seconds", "join_seconds", "wake_seconds", "rate_of_one", "rate_of_all"):
        assert name in out
