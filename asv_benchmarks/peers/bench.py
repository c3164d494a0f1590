"""``python -m peers bench``: collectives beside the memory limit, NumPy and other libraries."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from dvkernels.benchmarks import between_gpus
from dvkernels.benchmarks.between_gpus import Implementation, Library
from dvkernels.cli import argument_types
from dvkernels.cli import bench as our_bench
from dvkernels.errors import AlgorithmError, DeviceError, WorkerLostError
from peers import registry
from peers.worker import Worker, end_all

__all__ = ["LIBRARIES_BETWEEN_GPUS"]

HELP = "measure collectives by size, compared with the memory limit and other libraries"

_KNOWN = ("numpy", *registry.PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: those of ``python -m dvkernels bench``, and the peers' interpreters."""
    our_bench.add_arguments(parser, ", ".join(_KNOWN))
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="interpreter of the environment in which a peer is installed (repeatable)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 if any element was wrong or a peer was lost."""
    libraries = {**between_gpus.LIBRARIES, **LIBRARIES_BETWEEN_GPUS}
    others = our_bench.OtherLibraries("python -m peers", _started, libraries)
    return our_bench.measure(arguments, others)


def _started(
    arguments: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the chosen peers.

    Returns
    -------
    workers : dict
        The worker of each peer that was started.
    notes : dict of str
        Version of each peer, or why it was skipped.
    """
    pythons = registry.interpreters("bench", arguments.peer_python, registry.PEERS)
    for name in arguments.peers:
        if name not in _KNOWN:
            raise AlgorithmError(
                f"bench: {name!r} is not a known peer; use one of {', '.join(_KNOWN)}"
            )
    workers: dict[str, Worker] = {}
    notes: dict[str, str] = {}
    started: list[Worker] = []
    stack.callback(end_all, started)
    for name in arguments.peers or registry.PEERS:
        if name == "numpy":  # needs no worker
            continue
        peer, python = registry.PEERS[name], pythons.get(name, registry.default_python())
        version = registry.version_of(peer, python)
        if version is None:
            notes[name] = f"skipped: {peer.package} is not installed ({peer.how_to_get}; then name "
            notes[name] += f"its interpreter with --peer-python {name}=PATH)"
            continue
        try:
            worker = Worker(name, python, arguments.replicas)
            started.append(worker)
            worker.ask(1, "float32", 1)
        except WorkerLostError as error:
            notes[name] = f"skipped: {error}"
            continue
        workers[name] = worker
        notes[name] = (
            f"{peer.package} {version}, {argument_types.counted(arguments.replicas, 'rank')}"
        )
    return workers, notes


_TORCH_NCCL = "torch nccl"


def _torch(devices: Sequence[int], stack: contextlib.ExitStack) -> Implementation:
    """Start PyTorch with NCCL, one process per GPU."""
    peer, python = registry.ON_GPUS[_TORCH_NCCL], registry.default_python()
    if registry.version_of(peer, python) is None:
        raise DeviceError(f"{peer.package} is not installed ({peer.how_to_get})")
    worker = stack.enter_context(Worker(_TORCH_NCCL, python, len(devices), peers=registry.ON_GPUS))
    worker.ask(1, "float32", 1)

    def implementation(bench: object, inputs: Sequence[Any], outs: object) -> between_gpus.Timer:
        def timer(calls: int) -> float:
            answer = worker.ask(int(inputs[0].size), "float32", calls)
            if answer.wrong:
                raise DeviceError(f"{_TORCH_NCCL}: {answer.wrong} elements are wrong")
            return answer.seconds

        return timer

    return implementation


LIBRARIES_BETWEEN_GPUS = {_TORCH_NCCL: Library(_torch, has_outputs_here=False)}
