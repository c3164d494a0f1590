"""The probe reads and writes everything once a pass; rounds alternate; memory is not overdrawn."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dvkernels.benchmarks import memory, sizes
from dvkernels.benchmarks.failures import BenchmarkError, ContestantLostError
from dvkernels.benchmarks.probe import STEP, Probe
from dvkernels.benchmarks.stopwatch import Contestant, Timing, alternate
from dvkernels.devices import cpu


@pytest.mark.parametrize("num_buffers", [1, 2, 5])
@pytest.mark.parametrize("nbytes", [4, 5000, 1 << 20])
def test_a_pass_adds_one_everywhere(num_buffers, nbytes, monkeypatch):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)
    with Probe(num_buffers, nbytes) as probe:
        assert nbytes <= probe.moved_bytes / 2 + num_buffers * STEP / 2
        for contestant in probe.contestants().values():
            assert contestant.run(2) > 0
        assert len(probe.contestants()) == 4
        for buffer in probe._buffers:
            values, counts = np.unique(buffer, return_counts=True)
            assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
                1: 8,  # room to align
                1 + 4 * 2: probe.moved_bytes // (16 * num_buffers),
            }
    assert not [t for t in threading.enumerate() if t.name == "dvkernels-probe"]


def test_contestants_take_turns_and_one_may_leave():
    turns = []

    def contestant(name, seconds, lives=10**9):
        def run(num_calls):
            turns.append(name)
            if turns.count(name) > lives:
                raise ContestantLostError(name)
            return seconds * num_calls

        return Contestant(run, 4)

    players = {"a": contestant("a", 1.0), "b": contestant("b", 3.0), "c": contestant("c", 1.0, 4)}
    timings, lost = alternate(players, 5)
    assert list(lost) == ["c"]
    assert "".join(turns)[6:] == "abc" * 3 + "ab" * 2  # after two turns each to find out
    assert timings["b"].over(timings["a"]) == timings["b"].median == 3.0
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1).quartiles == (2.0, 4.0)
    assert Timing((7.0,), 1).quartiles == (7.0, 7.0)


def test_a_round_is_as_long_as_asked_for():
    calls = []
    alternate({"a": Contestant(lambda n: calls.append(n) or n * 1e-5)}, 3, batch_seconds=1e-2)
    assert calls[-3:] == [1000] * 3


def test_sizes():
    assert list(sizes.steps("4:256M", 4)) == [4**k for k in range(1, 15)]
    assert list(sizes.steps("1k", 4)) == [1024]
    for text in ("", "x", "0", "-4", "4K:1K", "1:2:3", "1.5K"):
        with pytest.raises(BenchmarkError):
            list(sizes.steps(text, 4))
    for nbytes in (1, 999, 1 << 10, 3 << 20, 5 << 30):
        assert nbytes >= 1 << 20 or sizes.parse(sizes.spell(nbytes)) == nbytes


def test_the_tighter_limit_of_memory_counts(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    7 kB\n")
    assert memory.available_bytes(tmp_path) == 7 << 10
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("3000\n")
    assert memory.available_bytes(tmp_path) == 2000
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) == 7 << 10
