"""train at signals: with a checkpoint folder each saves the step once, says where, and exits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

import dvkernels as dv
from dvkernels.cli import main, training_loop

WORDS = ["train", "--json", "--replicas", "2", "--hidden", "16", "--batch-size", "3072"]
needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs signals")


@pytest.fixture
def saves(monkeypatch):
    """Record the steps that are saved."""
    found = []
    save = dv.CheckpointManager.save

    def recorded(self, step, **options):
        found.append(step)
        return save(self, step, **options)

    monkeypatch.setattr(dv.CheckpointManager, "save", recorded)
    return found


def signals_at(monkeypatch, step, *numbers):
    """Send signals in the middle of a step of the replicas."""
    take_step = training_loop.Training._step

    def interrupted(self):
        if self.steps == step - 1 and len(self.times.marks) == 2:
            for number in numbers:
                signal.raise_signal(number)
        take_step(self)

    monkeypatch.setattr(training_loop.Training, "_step", interrupted)


@needs_signals
@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["SIGINT"], 130),
        (["SIGINT", "SIGINT", "SIGINT"], 130),
        (["SIGHUP"], 129),
        (["SIGTERM"], 7),
        (["SIGUSR1", "SIGUSR1"], 7),
    ],
)
def test_a_signal_saves_its_step_once(names, status, saves, monkeypatch, tmp_path, capsys):
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    signals_at(monkeypatch, 3, *(getattr(signal, name) for name in names))
    options = ["--checkpoint-dir", str(tmp_path / "run"), "--preemption-exit-code", "7"]
    with pytest.raises(SystemExit) as end:
        main.main([*WORDS, "--epochs", "4", *options])
    assert end.value.code == status
    assert saves == [3]
    out, err = capsys.readouterr()
    assert out == ""
    (path,) = (tmp_path / "run").glob("step-*")
    assert f"saved step 3 of 20 after {names[0]} in {path}; --resume goes on" in err
    assert handlers == {name: signal.getsignal(getattr(signal, name)) for name in names}

    monkeypatch.undo()
    assert main.main([*WORDS, "--epochs", "4", *options, "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["resumed_at_step"] == 3
    if names == ["SIGINT"]:
        assert main.main([*WORDS, "--epochs", "4"]) == 0
        whole = json.loads(capsys.readouterr().out)
        assert resumed["weights_sha256"] == whole["weights_sha256"]


@needs_signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_ignored_signal_stays_ignored(name, monkeypatch, tmp_path, capsys):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signals_at(monkeypatch, 2, number)
        options = ["--epochs", "1", "--checkpoint-dir", str(tmp_path / "run")]
        assert main.main([*WORDS, *options]) == 0
    finally:
        signal.signal(number, before)
    assert json.loads(capsys.readouterr().out)["steps"] == 5


@needs_signals
def test_without_a_checkpoint_folder_ctrl_c_ends_at_once(monkeypatch, capsys):
    signals_at(monkeypatch, 3, signal.SIGINT)
    assert main.main([*WORDS, "--epochs", "4"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.rstrip().endswith("interrupted")


@needs_signals
def test_a_signal_after_the_last_step_saves_that(saves, monkeypatch, tmp_path, capsys):
    take_step = training_loop.Training._step

    def interrupted(self):
        take_step(self)
        if self.is_over and len(self.times.marks) == 1:  # on one device, which comes last
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training_loop.Training, "_step", interrupted)
    options = ["--epochs", "1", "--checkpoint-dir", str(tmp_path), "--checkpoint-every", "100"]
    with pytest.raises(SystemExit) as end:
        main.main([*WORDS, *options])
    assert end.value.code == 130
    assert saves == [5]
    assert "saved step 5 of 5" in capsys.readouterr().err


@needs_signals
def test_a_run_whose_terminal_is_gone_saves(tmp_path):
    """A terminal that is closed sends SIGHUP, and refuses all that is written to it."""
    own, terminal = pty.openpty()
    os.set_blocking(own, False)

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = [*WORDS, "--epochs", "100000", "--checkpoint-every", "1", "--checkpoint-dir"]
    with subprocess.Popen(
        [sys.executable, "-m", "dvkernels", *words, str(tmp_path)],
        stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=take_terminal,
    ) as program:  # fmt: skip
        os.close(terminal)
        while program.poll() is None and not any(tmp_path.glob("step-*")):
            time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                os.read(own, 1 << 16)
        os.close(own)
        try:
            assert program.wait(timeout=60) == 129
        finally:
            program.kill()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("step-")]
