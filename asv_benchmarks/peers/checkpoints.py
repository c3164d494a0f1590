"""Benchmark of checkpoints: saving and restoring against other libraries, steps during a save."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dvkernels import replica_context
from dvkernels.benchmarks.stopwatch import Samples, alternate
from dvkernels.checkpoint.checkpoint import Checkpoint
from dvkernels.strategies.mirrored import MirroredStrategy
from dvkernels.variables.variable import Variable
from peers.registry import Peer
from peers.worker import Worker
from peers.workers import checkpoint_data

__all__ = ["CASES", "PEERS", "measure", "memory_folder"]

CASES = {
    "save": "variables to files, synced, with checksums (ours alone)",
    "restore": "files to memory, checksums compared (ours alone)",
    "step": "a training step on two replicas, alone and during a background save",
}


def _peer(name: str, package: str, module: str) -> Peer:
    how = f"pip install {package}"
    return Peer(package, module, "checkpoint_worker.py", False, how, (name,))


PEERS: Mapping[str, Peer] = {
    "safetensors": _peer("safetensors", "safetensors", "safetensors"),
    "savez": _peer("savez", "numpy", "numpy"),
    "torch": _peer("torch", "torch", "torch"),
    "orbax": _peer("orbax", "orbax-checkpoint", "orbax.checkpoint"),
}


def memory_folder() -> str | None:
    """Return the folder of a file system in memory; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def measure(
    case: str, folder: str, nbytes: int, num_rounds: int, workers: Mapping[str, Worker]
) -> dict[str, Samples]:
    """Return the seconds of this library and of each peer, in alternating rounds."""
    with contextlib.ExitStack() as stack:
        if case == "step":
            return alternate(_steps(folder, nbytes, stack), num_rounds)
        timers: dict[str, Callable[[], float]] = {"dvkernels": _ours(case, folder, nbytes, stack)}
        for name, worker in workers.items():
            command = {"case": case, "folder": folder, "nbytes": nbytes}

            def ask(worker: Worker = worker, command: Mapping[str, object] = command) -> float:
                answer = worker.send(command)
                if answer.wrong:
                    raise AssertionError(f"{worker.name} restored {answer.wrong} wrong elements")
                return answer.seconds

            ask()  # the first call loads modules
            timers[name] = ask
        warm = {name: functools.partial(_second, timer) for name, timer in timers.items()}
        return alternate(warm, num_rounds)


def _second(timer: Callable[[], float]) -> float:
    """Return the seconds of the second of two calls.

    A virtual machine returns memory to its host once it has been free for two seconds. Getting
    1 GiB back took 1 to 3 s, writing it 0.3 s: the library that allocated first would pay for
    that. After a call of its own each library writes to memory that it has just freed.
    """
    timer()
    return timer()


def _ours(case: str, folder: str, nbytes: int, stack: contextlib.ExitStack) -> Callable[[], float]:
    arrays = checkpoint_data.arrays(nbytes)
    strategy = stack.enter_context(MirroredStrategy(["cpu:0"]))
    with strategy.scope():
        variables = {name: Variable(array, name=name) for name, array in arrays.items()}
    checkpoint = stack.enter_context(Checkpoint(**variables))
    path = Path(folder) / "dvkernels"

    def save() -> float:
        shutil.rmtree(path, ignore_errors=True)
        started = time.perf_counter()
        checkpoint.save(path)
        return time.perf_counter() - started

    def restore() -> float:
        for variable in variables.values():
            variable.assign(np.zeros(variable.shape, variable.dtype))
        started = time.perf_counter()
        checkpoint.restore(path)
        seconds = time.perf_counter() - started
        if any(not np.array_equal(v.read_value(), arrays[n]) for n, v in variables.items()):
            raise AssertionError("dvkernels restored wrong elements")
        return seconds

    save()
    return save if case == "save" else restore


def _steps(folder: str, nbytes: int, stack: contextlib.ExitStack) -> dict[str, Callable[[], float]]:
    """Return the timers of a step alone, of a step during a save, and of the blocking copy."""
    arrays = checkpoint_data.arrays(nbytes)
    checkpoint = stack.enter_context(Checkpoint(**arrays))
    strategy = stack.enter_context(MirroredStrategy(["cpu:0", "cpu:1"]))
    path = Path(folder) / "background"
    # Elementwise work, because BLAS would start threads of its own.
    weights = [np.ones((256, 1024), np.float32) for _ in range(2)]

    def work() -> None:
        replica = replica_context.get_replica_context()
        assert replica is not None
        hidden = weights[replica.replica_id_in_sync_group]
        for _ in range(8):
            hidden = np.tanh(hidden)
        replica.all_reduce("mean", hidden)

    def step() -> float:
        started = time.perf_counter()
        strategy.run(work)
        return time.perf_counter() - started

    def alone() -> float:
        return float(np.mean([step() for _ in range(1000)]))

    def during_a_save() -> float:
        blocking()  # see _second
        checkpoint.save(path, background=True)
        times = []
        while checkpoint.is_saving:
            times.append(step())
        checkpoint.close()
        shutil.rmtree(path)
        return float(np.mean(times))

    def blocking() -> float:
        """Return the seconds for which a background save blocks the caller."""
        started = time.perf_counter()
        checkpoint.save(path, background=True)
        seconds = time.perf_counter() - started
        checkpoint.close()
        shutil.rmtree(path)
        return seconds

    blocking()
    return {"dvkernels": alone, "during a save": during_a_save, "copy to host": blocking}
