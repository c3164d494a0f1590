"""Earlier name of ``python -m dvkernels.launcher.worker``, kept for existing job scripts."""

from __future__ import annotations

import sys

from dvkernels.launcher.worker import main

__all__: list[str] = []

if __name__ == "__main__":
    main(sys.argv[1:])
