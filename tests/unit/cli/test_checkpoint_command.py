"""checkpoint: show prints the contents of a checkpoint, verify finds damaged bytes."""

from __future__ import annotations

import json

import faults
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.cli.main import main


@pytest.fixture
def folder(tmp_path):
    optimizer = dv.optimizers.SGD(0.1, 0.9)
    weight = dv.Variable(np.ones((2, 3)))
    optimizer.apply_gradients([(np.ones((2, 3)), weight)])
    checkpoint = dv.Checkpoint(
        model={"weight": weight}, optimizer=optimizer, rng=np.random.default_rng(0), lr=0.5
    )
    manager = dv.CheckpointManager(checkpoint, tmp_path)
    for step in (1, 2):
        manager.save(step, metadata={"note": "a\x1b[31m"})
    return tmp_path


def test_show(folder, capsys):
    assert main(["checkpoint", "show", str(folder / "step-00000002")]) == 0
    shown = capsys.readouterr().out
    for part in ("step 2", "model/weight: variable float64[2, 3], on_write/none", "lr: 0.5",
                 "velocity of model/weight float64[2, 3]", "generator PCG64", "note"):  # fmt: skip
        assert part in shown
    assert "\x1b" not in shown


def test_json(folder, capsys):
    assert main(["checkpoint", "show", str(folder), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (first["step"], second["step"], first["outcome"]) == (1, 2, "PASS")
    held = {each["name"]: each["holds"] for each in first["objects"]}
    assert held["lr"] == "0.5"
    assert held["model/weight"].startswith("variable float64[2, 3]")
    faults.flip_bit(folder / "step-00000001" / "shard-00000.safetensors", 2000)
    assert main(["checkpoint", "verify", str(folder), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (first["outcome"], second["outcome"]) == ("FAIL", "PASS")
    assert "shard-00000" in first["error"]


def test_verify(folder, capsys):
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    faults.flip_bit(folder / "step-00000001" / "shard-00000.safetensors", 2000)
    assert main(["checkpoint", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert ("FAIL" in out, "PASS" in out) == (True, True)


def test_a_missing_checkpoint_fails(tmp_path, capsys):
    assert main(["checkpoint", "verify", str(tmp_path / "none")]) == 1
    assert "FAIL" in capsys.readouterr().out
