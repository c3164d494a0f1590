"""Ways to write a program that run in a process of their own: libraries with another environment.

The script of a worker in ``peers/workers/`` has a function ``write`` of the data and the number of
devices, as :data:`programs.program.Write`. Its process writes the result into a file, and measures
the seconds itself: what passes between the processes is not in them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import registry
from peers.registry import Peer
from peers.worker import Worker, end_all

__all__ = ["PEERS", "Measured", "lines_of", "started", "versions", "why_skipped"]

PEERS: Mapping[str, Peer] = {
    "tensorflow": registry.PEERS["tensorflow"]._replace(script="tensorflow_network_worker.py"),
    "jax": registry.PEERS["jax"]._replace(script="jax_network_worker.py"),
    "torch": registry.PEERS["gloo"]._replace(script="torch_network_worker.py", arguments=()),
}
_WORKERS = Path(registry.__file__).parent / "workers"


class Measured(NamedTuple):
    """A result, with the seconds that its process has measured."""

    seconds: float
    result: Any


def versions(pythons: Mapping[str, str]) -> dict[str, str]:
    """Return the version of each peer, "absent" where it is not installed."""
    return {name: _version(name, pythons) or "absent" for name in PEERS}


def _version(name: str, pythons: Mapping[str, str]) -> str | None:
    return registry.version_of(PEERS[name], pythons.get(name, registry.default_python()))


def why_skipped(name: str, pythons: Mapping[str, str]) -> str | None:
    """Return why a peer cannot be measured here, None if it can."""
    peer = PEERS[name]
    if _version(name, pythons) is not None:
        return None
    return (
        f"{peer.package} is not installed ({peer.how_to_get}; then name its interpreter with "
        f"--peer-python {name}=PATH)"
    )


def lines_of(name: str, count: Callable[[str, str], int]) -> int:
    """Return the lines of code of a peer, as ``count`` counts those of a function in a source."""
    return count((_WORKERS / PEERS[name].script).read_text(encoding="utf-8"), "write")


@contextlib.contextmanager
def started(
    name: str, pythons: Mapping[str, str], data: Any, num_devices: int
) -> Iterator[Callable[[], Measured]]:
    """Start a peer with the data, a named tuple of arrays; yield a call that runs the program."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given, result = folder / "data.npz", folder / "result.npz"
        np.savez(given, **data._asdict())
        python = pythons.get(name, registry.default_python())
        worker = Worker(name, python, num_devices, peers=PEERS)
        stack.callback(end_all, [worker])

        def run() -> Measured:
            answer = worker.send({"data": str(given), "result": str(result)})
            with np.load(result) as found:
                return Measured(answer.seconds, [found[key] for key in found.files])

        yield run
