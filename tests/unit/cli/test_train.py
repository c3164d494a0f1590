"""train: the same weights on any number of replicas, one JSON object, and its exit statuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import fork_server
import pytest
from threadpoolctl import threadpool_limits

import dvkernels as dv
from dvkernels.cli import digits, info, main, mlp, training_config, training_loop
from dvkernels.kernels import compile_cache
from dvkernels.kernels.cuda.engine import shipped_ptx
from dvkernels.replicas import thread_limits

KEYS = {
    "test_accuracy", "final_loss", "diverged", "weights_sha256", "num_workers", "num_replicas",
    "steps", "resumed_at_step", "examples_per_second", "seconds_per_step", "seconds", "speed_up",
    "possible_speed_up", "share_of_other_programs", "relative_difference_to_one_device", "notes",
}  # fmt: skip
SMALL = ["--hidden", "16", "--batch-size", "3072"]  # five steps an epoch


def train(strategy, config, data):
    with strategy, threadpool_limits(1, user_api="blas"):  # as the command does
        return training_loop.train(strategy, config, data)


def accuracy(training, config, data):
    weights = training.weights.numpy()
    return mlp.accuracy(weights, config.num_hidden, data.test_images, data.test_labels)


def difference(training, reference):
    return training_loop.relative_difference(training.weights.numpy(), reference.weights.numpy())


def mirrored(num_replicas, **options):
    return dv.MirroredStrategy([f"cpu:{k}" for k in range(num_replicas)], **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("batch_size", [149, 128])
def test_the_weights_are_those_of_one_device(dtype, tolerance, batch_size):
    data = digits.load(dtype)
    config = training_config.TrainingConfig(
        epochs=8, batch_size=batch_size, num_hidden=64, dtype=dtype
    )
    reference = train(dv.OneDeviceStrategy("cpu:0"), config, data)
    assert accuracy(reference, config, data) > 0.9
    for num_replicas in (2, 3, 7):
        outcome = train(mirrored(num_replicas), config, data)
        assert outcome.steps == reference.steps == outcome.num_steps
        assert difference(outcome, reference) <= tolerance
        assert outcome.losses == pytest.approx(reference.losses, rel=1e3 * tolerance)
        assert abs(accuracy(outcome, config, data) - accuracy(reference, config, data)) <= 0.01


def test_replicas_without_examples():
    data = digits.load("float64")
    few = digits.Digits(data.train_images[:22], data.train_labels[:22], *data[2:])
    config = training_config.TrainingConfig(epochs=3, batch_size=16, num_hidden=8, dtype="float64")
    reference = train(dv.OneDeviceStrategy("cpu:0"), config, few)
    outcome = train(mirrored(7, cross_device_ops="ring"), config, few)  # 66 = 4 x 16 + 2
    assert difference(outcome, reference) <= 1e-9


def test_median_accuracy_of_five_seeds():
    data = digits.load("float32")
    accuracies = []
    for seed in range(5):
        config = training_config.TrainingConfig(
            epochs=30, batch_size=128, num_hidden=256, seed=seed
        )
        accuracies.append(accuracy(train(mirrored(2), config, data), config, data))
    assert statistics.median(accuracies) >= 0.97


@pytest.mark.parametrize(
    "seeds",
    [pytest.param([0], marks=pytest.mark.wide), pytest.param([1, 2, 3], marks=pytest.mark.slow)],
)
def test_the_default_work_reaches_its_accuracy(capsys, seeds):
    reports = []
    for seed in seeds:
        assert main.main(["train", "--json", "--seed", str(seed)]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert statistics.median(report["test_accuracy"] for report in reports) >= 0.985
    assert max(report["relative_difference_to_one_device"] for report in reports) <= 1e-4
    assert not any(report["diverged"] for report in reports)


def test_shifted_digits_are_nine_of_each():
    data = digits.load("float64")
    shifted = digits.with_shifts(data)
    background = -digits.MEAN / digits.DEVIATION
    pictures = shifted.train_images.reshape(9, -1, 8, 8)
    original = data.train_images.reshape(-1, 8, 8)
    assert (pictures[4] == original).all()
    assert (pictures[0][:, 1:, 1:] == original[:, :-1, :-1]).all()
    assert pictures[5][:, :, -1] == pytest.approx(background)
    assert (shifted.train_labels.reshape(9, -1) == data.train_labels).all()
    assert shifted.test_images is data.test_images


def test_one_json_object(capsys):
    digests = []
    for seed in ("3", "3", "4"):
        assert main.main(["train", "--json", "--replicas", "2", "--epochs", "2", *SMALL,
                          "--seed", seed]) == 0  # fmt: skip
        out, err = capsys.readouterr()
        report = json.loads(out, parse_constant=pytest.fail)
        assert report.keys() >= KEYS
        assert "training" in err
        digests.append(report["weights_sha256"])
        for prefix in ("", "one_device_"):
            assert min(report[f"{prefix}seconds"].values()) > -1e-6
            parts = sum(report[f"{prefix}seconds"].values())
            assert parts == pytest.approx(report[f"{prefix}seconds_per_step"])
        assert 0 < report["speed_up"] > 0 < report["possible_speed_up"]
        assert report["num_blocks"] == report["steps"] - 1  # the first one is the warm-up
    assert digests[0] == digests[1] != digests[2]


def test_text_output(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "run.svg"
    words = ["--replicas", "3", "--epochs", "1", *SMALL, "--plot", str(plot)]
    assert main.main(["train", *words]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"speed-up \d+\.\d+ of \d+\.\d+ possible \(3 replicas\)\n", out)
    assert "test accuracy" in out
    assert "against one device" in out
    assert "3 replicas" in err
    assert "reduce and update" in plot.read_text() or plot.stat().st_size > 1000


def test_a_diverged_run_is_called_that(capsys, tmp_path):
    folder, words = tmp_path / "run", ["--replicas", "2", "--epochs", "60", *SMALL]
    options = ["--learning-rate", "1e9", "--checkpoint-dir", str(folder), "--json"]
    assert main.main(["train", *words, *options, "--checkpoint-every", "1"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["diverged"]
    assert report["steps"] < 300
    assert "diverged" in report["notes"][0]
    assert "--learning-rate below 1e+09" in report["notes"][0]
    manager = dv.CheckpointManager(dv.Checkpoint(), folder)
    assert manager.restore_latest(partial=True).step == report["steps"] - 1


@pytest.mark.parametrize(
    "options",
    [
        ["--replicas", "0"],
        ["--epochs", "-1"],
        ["--batch-size", "x"],
        ["--hidden", "1.5"],
        ["--seed", "-3"],
        ["--device", "cuda"],
        ["--device", "toaster"],
        ["--dtype", "int8"],
        ["--learning-rate", "nan"],
        ["--unknown"],
    ],
)
def test_bad_options_end_with_status_2_and_a_message(options, capsys):
    try:
        status = main.main(["train", *options])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert "error: " in err
    assert not out


def test_info_computes_on_every_device(capsys):
    assert main.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    passed = [line.split()[0] for line in lines if line.endswith("PASS")]
    assert passed == [*(str(device) for device in dv.list_devices()), "together"]
    (cache_line,) = [line for line in lines if line.startswith("compiled code: ")]
    assert str(compile_cache.folder()) in cache_line
    assert main.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found["devices"], "together"] == passed
    assert {*found["devices"].values(), found["together"]} == {"PASS"}
    assert f"compiled code: {found['compiled_code']}" == cache_line
    assert any("interpreter lock o" in line and "threading layer" in line for line in lines)
    share, replicas = found["threads"]["share"], found["threads"]["replicas"]
    (threads_line,) = [line for line in lines if line.startswith("threads: ")]
    assert f"at most {share} in each of {replicas} replicas" in threads_line
    assert all(name in threads_line for name in found["threads"]["libraries"])
    assert found["cuda_kernels"] == shipped_ptx.described()
    info._print_machine({**found, "cuda": "found"})  # where there is a GPU
    assert f"\nkernels of GPUs: {found['cuda_kernels']}\n" in capsys.readouterr().out


def test_info_says_when_nothing_limits_the_threads(capsys, monkeypatch):
    monkeypatch.setattr(thread_limits, "_threadpoolctl", lambda: None)
    monkeypatch.setattr(thread_limits, "_has_warned", True)
    assert main.main(["info"]) == 0
    assert "threadpoolctl is not installed" in capsys.readouterr().out


# -- in a process of its own, and edge cases -----------------------------------------------------


def in_a_process(*arguments):
    return fork_server.run_module("dvkernels", *arguments)


def test_every_process_prints_the_same_weights(capsys):
    options = ["train", "--json", "--replicas", "2", "--epochs", "2", *SMALL]
    done = in_a_process(*options)
    assert done.returncode == 0, done.stderr
    assert "training" in done.stderr
    assert main.main(options) == 0
    here = json.loads(capsys.readouterr().out)
    there = json.loads(done.stdout)  # fails if anything else is printed
    assert there["weights_sha256"] == here["weights_sha256"]
    assert there["steps"] == 2 * -(-9 * 1437 // 3072)
    assert there["relative_difference_to_one_device"] <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_a_last_batch_of_one_example(dtype, tolerance):
    data = digits.load(dtype)
    config = training_config.TrainingConfig(epochs=6, batch_size=359, num_hidden=32, dtype=dtype)
    assert len(data.train_images) % config.batch_size == 1
    reference = train(dv.OneDeviceStrategy("cpu:0"), config, data)
    for num_replicas in (1, 2, 3, 7):
        outcome = train(mirrored(num_replicas), config, data)
        assert difference(outcome, reference) <= (tolerance if num_replicas > 1 else 0)
        assert outcome.loss == pytest.approx(reference.loss, rel=1e3 * tolerance)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.main(["train"]) == 2
    assert "dvkernels[demo]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", "--device", "cuda"], ["train", "--replicas", "0"]]
)
def test_bad_input_in_a_process(arguments):
    done = in_a_process(*arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_an_interrupt_leaves_no_result(tmp_path):
    command = [sys.executable, "-m", "dvkernels", "train", "--json", "--replicas", "3"]
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(
            [*command, "--epochs", "100000"], stdout=subprocess.PIPE, stderr=err
        )
        try:
            end = time.monotonic() + 30
            while "test digits" not in (tmp_path / "err").read_text():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert out == b""
    assert (tmp_path / "err").read_text().rstrip().endswith("interrupted")


def test_a_complete_run_says_so_and_goes_on_with_more_epochs(tmp_path, capsys):
    def run(epochs, *more):
        words = ["--replicas", "2", *SMALL, "--json", "--epochs", str(epochs), *more]
        status = main.main(["train", *words])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert "nan" not in out + err
        return json.loads(out), err

    options = ["--checkpoint-dir", str(tmp_path / "run"), "--resume"]
    first, _ = run(1, *options)
    again, err = run(1, *options)
    assert "nothing left to do" in err
    assert "larger --epochs" in err
    assert again["weights_sha256"] == first["weights_sha256"]
    for epochs in (2, 4):
        longer, err = run(epochs, *options)
        assert "nothing left to do" not in err
        assert longer["weights_sha256"] == run(epochs)[0]["weights_sha256"]
    main.main(["train", "--replicas", "2", *SMALL, "--epochs", "3", *options])
    assert "was repeat(4) when it was saved and is repeat(3)" in capsys.readouterr().err
