"""The possible speed: the compute of a program on all cores at once, without synchronization.

One process per core computes its share of the program: no thread waits for another one, nor for the
interpreter's lock, nor for its page faults. The time is that of the process that takes longest.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.machine import settle_allocator
from peers.registry import Peer
from peers.worker import Worker, end_all

__all__ = ["AllCores", "serve"]


class AllCores:
    """Processes that compute the shares of programs; a context manager that ends them."""

    def __init__(self, count: int) -> None:
        script, name = str(Path(__file__).with_name("share_worker.py")), "share"
        self._workers: list[Worker] = []
        with contextlib.ExitStack() as stack:
            stack.callback(end_all, self._workers)
            for rank in range(count):
                peer = Peer("numpy", "numpy", script, False, "", (str(rank),))
                worker = Worker(name, sys.executable, count, peers={name: peer})
                self._workers.append(worker)
            self._pool = stack.enter_context(ThreadPoolExecutor(count))
            self._stack = stack.pop_all()

    def seconds(self, program: str, sizes: Mapping[str, int]) -> float:
        """Run the shares of a program at the same time; return the seconds of the slowest."""
        command = {"program": program, "sizes": dict(sizes)}
        answers = self._pool.map(lambda worker: worker.send(command), self._workers)
        return max(float(answer.seconds) for answer in answers)

    def __enter__(self) -> AllCores:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def serve(rank: int, count: int) -> None:
    """Answer the commands of standard input until it ends; in each process of :class:`AllCores`."""
    from threadpoolctl import threadpool_limits

    from programs.registry import PROGRAMS

    settle_allocator()
    made: dict[str, Any] = {}  # command -> data
    for line in sys.stdin:
        command = json.loads(line)
        program = PROGRAMS[command["program"]]
        assert program.share is not None
        if line not in made:
            made = {line: program.make(**command["sizes"])}
        with threadpool_limits(1, user_api="blas"):
            started = time.perf_counter()
            program.share(made[line], rank, count)
            seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "wrong": 0, "note": ""}), flush=True)
