"""Run a worker's module where this package is not installed: ``python bootstrap.py MODULE ...``.

The workers need NumPy and their own library only, so the packages around them are stood in for by
empty ones that know where their files lie.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

__all__: list[str] = []


def main() -> None:
    """Import the module that the first argument names, and run its ``main``."""
    peers = Path(__file__).resolve().parent
    # This folder was put there for this script; its files are not to be found by short names.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != peers]
    folders = {
        "dvkernels": peers.parent.parent,
        "dvkernels.benchmarks": peers.parent,
        "dvkernels.benchmarks.peers": peers,
    }
    for name, folder in folders.items():
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    module = sys.argv.pop(1)
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
