"""``python -m dvkernels train --checkpoint-dir D --resume``, killed and preempted."""

import json
import signal
import subprocess
import sys
import time

import fork_server
import pytest
from kills import run_and_kill

EPOCHS = 8


def words(*options, replicas=2):
    return [
        "train", "--json", "--epochs", str(EPOCHS), "--batch-size", "1024", "--hidden", "32",
        "--dtype", "float64",
        "--replicas", str(replicas), *options,
    ]  # fmt: skip


def command(*options):
    return [sys.executable, "-m", "dvkernels", *words(*options)]


def train(*options, replicas=2):
    return fork_server.run_module("dvkernels", *words(*options, replicas=replicas))


def report(output):
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def whole():
    return report(train().stdout)


@pytest.mark.wide
def test_a_killed_and_resumed_run_ends_with_the_same_weights(tmp_path, whole):
    def is_under_way(output):
        return any(tmp_path.glob("step-*"))

    options = ["--checkpoint-dir", str(tmp_path), "--checkpoint-every", "5", "--resume"]
    killed = run_and_kill(
        command(*options), most_kills=2, seed=3, longest_seconds=0.1, is_under_way=is_under_way
    )
    resumed = report(killed.output)
    assert killed.num_kills > 0
    assert resumed["resumed_at_step"] > 0
    for key in ("weights_sha256", "steps", "test_accuracy", "final_loss"):
        assert resumed[key] == whole[key]


@pytest.mark.wide
def test_a_preempted_run_resumes_on_another_number_of_replicas(tmp_path, whole):
    options = ["--checkpoint-dir", str(tmp_path), "--checkpoint-every", "1"]
    with subprocess.Popen(
        command(*options, "--preemption-exit-code", "9"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        while program.poll() is None and not any(tmp_path.glob("step-*")):
            time.sleep(0.005)
        program.send_signal(signal.SIGTERM)
        err = program.communicate()[1]
    assert program.returncode == 9, err
    done = train(*options, "--resume", replicas=3)
    resumed = report(done.stdout)
    assert 0 < resumed["resumed_at_step"] < whole["steps"]
    assert resumed["relative_difference_to_one_device"] <= 1e-9
    assert resumed["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-6)
    again = train(*options)
    assert again.returncode != 0
    assert "pass --resume" in again.stderr
