"""PyTorch's Gloo: one process a rank, TCP over loopback. The first starts the others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dvkernels.benchmarks import inputs
from dvkernels.benchmarks.peers import protocol

__all__: list[str] = []


class _AllReduce:
    variants: tuple[str, ...] = ("in place",)

    def __init__(self, torch: Any, rank: int) -> None:
        self._torch = torch
        self._rank = rank

    def prepare(self, count: int, dtype: np.dtype[Any], seed: int) -> None:
        self._own = self._buffer = np.empty(0)
        self._own = np.empty(count, dtype)
        self._buffer = np.empty(count, dtype)
        self._tensor = self._torch.from_numpy(self._buffer)
        inputs.fill(self._own, "sum", seed, self._rank)

    def call_once(self, variant: str) -> list[np.ndarray[Any, Any]]:
        self._buffer[:] = self._own
        self._torch.distributed.all_reduce(self._tensor)
        return [self._buffer]

    def seconds(self, variant: str, num_calls: int) -> float:
        distributed, tensor = self._torch.distributed, self._tensor
        self.call_once(variant)
        distributed.barrier()
        return protocol.repeat(lambda: distributed.all_reduce(tensor), num_calls, time.perf_counter)


class _Processes:
    """The other ranks, each behind a pipe."""

    def __init__(self, num_replicas: int, store: Path) -> None:
        bootstrap = Path(__file__).with_name("bootstrap.py")
        command = [sys.executable, str(bootstrap), __name__]
        self._others = [
            subprocess.Popen(
                [*command, str(num_replicas), str(rank), str(store)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(1, num_replicas)
        ]

    def spread(self, message: protocol.Message) -> None:
        for process in self._others:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def collect(self, answer: protocol.Message) -> list[protocol.Message]:
        answers = [answer]
        for process in self._others:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers


def main() -> None:
    """Serve as rank 0, follow as another."""
    num_replicas = int(sys.argv[1])
    rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    line = protocol.Line()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(sys.argv[3]) if rank else Path(folder, "store")
        team = _Processes(num_replicas, store) if rank == 0 else None
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_replicas
        )
        actor = protocol.Actor(_AllReduce(torch, rank), num_replicas)
        if team is None:
            _follow(line, actor)
        else:
            ready = {
                "version": f"PyTorch {torch.__version__}",
                "ranks": num_replicas,
                "variants": list(_AllReduce.variants),
            }
            protocol.serve(line, actor, team, ready)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Gloo's threads would wait for each other


def _follow(line: protocol.Line, actor: protocol.Actor) -> None:
    while True:
        message = line.hear()
        if message["do"] == "end":
            return
        line.say(actor.act(message))
